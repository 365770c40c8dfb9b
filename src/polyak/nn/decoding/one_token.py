r"""Decoding one token of one sequence: the same function with little but its kernels.

On a small model, a token's arithmetic takes less time than the calls around it: modules, scalars
mapped anew by each substep, checks for transforms that cannot occur here. Rules step as they are
written; what they find as their scalars and norm are values made ready once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.nn.attention import Attention
from polyak.nn.attention._matrix import MatrixAttention
from polyak.nn.attention.softmax import SoftmaxAttention
from polyak.nn.cache import KeyValueCache
from polyak.nn.decoding.one_position import Turn
from polyak.nn.decoding.one_start import lookup, starts_of
from polyak.nn.decoding.one_state import KINDS, OneState, Scratch
from polyak.nn.decoding.one_vector import is_large, product
from polyak.nn.decoding.ready import pre_norm, ready_norm, ready_rule
from polyak.nn.embedding import Embedding
from polyak.nn.mlp import MLP
from polyak.nn.placement import step as any_step
from polyak.nn.splitting import norm_after
from polyak.nn.transformer import Transformer
from polyak.rules import Oracle, State
from polyak.rules._norms import LayerNorm, RMSNorm

Step = Callable[[Tensor, State, Oracle], tuple[Tensor, State]]


class OneToken:
    """Logits after one more token, for one sequence without padding.

    Made for weights as they are now; make another where they change.

    Args:
        model: in evaluation mode; see `supports`.
        cache: of the sequence so far; its contents are copied.
    """

    def __init__(self, model: Transformer, cache: KeyValueCache) -> None:
        config, placement = model.config, model.placement
        self._position = cache.get_seq_length()
        self._store = _copied(cache, self._position) if cache.slots else None
        self._states: dict[int, Any] = dict(enumerate(cache.states))
        self._shared: dict[str, Tensor] = dict(model.attention_scalars.items())
        self._scratch: Scratch | None = None
        if self._states:
            kind: Any = model.blocks[0].attention
            self._scratch = Scratch(kind, model.head.weight)
        self._new: tuple[Tensor, ...] = ()
        self._keys: tuple[Tensor, ...] = ()
        self._values: tuple[Tensor, ...] = ()
        self._slot = 0
        self._turn = Turn(model.blocks[0].attention, config.context_length)  # type: ignore[arg-type]
        self._steps = []
        for block in model.blocks:
            kind = block.attention
            attention = self._attention(kind) if self._store is not None else self._state_of(kind)
            mlp = _mlp(block.mlp)  # type: ignore[arg-type]
            oracles = {"attention": attention, "mlp": mlp, "layer": _both(attention, mlp)}
            if block.reinjection_raw is not None:
                self._steps.append((_reinjected(block), attention))
            for substep, rule in block.rules.items():  # type: ignore[union-attr, operator]
                ready = ready_rule(rule)
                alone = ready.State is placement.State
                step: Step = ready.step if alone else partial(any_step, ready)
                if config.norm_position == "post":
                    after = norm_after(substep, block.attention, block.mlp)  # type: ignore[arg-type]
                    step = _normed(step, ready_norm(after))
                self._steps.append((step, oracles[substep]))
        self._embedding = lookup(model.embedding)
        self._state = placement.State
        self._starts = starts_of(model)
        self._norm = ready_norm(model.norm)
        self._head = product(model.head.weight, model.head.bias)

    @staticmethod
    def supports(model: Transformer) -> bool:
        """Whether this model is on a CPU, in float32 or float64, and has no parts of a user's own.

        A rule may be a user's own.
        """
        norms, weight = (LayerNorm, RMSNorm), model.head.weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
            return False
        for block in model.blocks:
            attention: Any = block.attention
            mlp: Any = block.mlp
            if type(attention) not in (SoftmaxAttention, *KINDS) or type(mlp) is not MLP:
                return False
            if type(attention.norm) not in norms or type(mlp.norm) not in norms:
                return False
        tables = [model.embedding, *model.streams.values()]
        return type(model.norm) in norms and all(type(table) is Embedding for table in tables)

    def logits(self, token: Tensor) -> Tensor:
        """Logits (1, V) after the token (1,), which is read and kept."""
        ids, position, self._slot = token[None], self._position, 0
        if self._store is not None:
            self._new = self._store.narrow(3, position, 1).unbind(0)
            keys, values = self._store.narrow(3, 0, position + 1).unbind(1)
            self._keys, self._values = keys.transpose(2, 3).unbind(0), values.unbind(0)
        self._turn.to(position)
        x = self._embedding(ids, position)
        state = self._state(**{name: start(ids, position, x) for name, start in self._starts})
        for move, oracle in self._steps:
            x, state = move(x, state, oracle)
        self._position += 1
        return self._head(self._norm(x))[0]

    def _attention(self, module: Attention) -> Oracle:
        out = product(module.out.weight, module.out.bias)
        queries, groups, d = module.num_heads, module.num_kv_heads, module.head_dim
        grouped, kept = (groups, -1, d), (2, groups, 1, d)
        flat = (1, 1, queries * d)
        weight: Tensor = module.qkv.weight
        bias: Tensor | None = module.qkv.bias
        scale = d**-0.5
        if module.q_norm is None and not is_large(weight):  # scaled once instead of for every token
            rows = weight.new_ones(weight.shape[0])
            rows[: queries * d] = scale
            weight, bias, scale = weight * rows[:, None], None if bias is None else bias * rows, 1.0
        heads_of = self._heads(module, product(weight, bias))

        def oracle(x: Tensor) -> Tensor:
            heads = heads_of(x)
            slot = self._slot
            self._slot += 1
            self._new[slot].copy_(heads[queries:].view(kept))
            # the query heads of a group are rows of one product with the keys that they share
            q = heads[:queries].view(grouped)
            scores = torch.bmm(q if scale == 1 else q * scale, self._keys[slot])
            return out(torch.bmm(scores.softmax(-1), self._values[slot]).view(flat))

        return oracle

    def _heads(self, module: Attention, qkv: Oracle) -> Oracle:
        """Queries, keys and values of x (1, 1, d) as (H + 2H_kv, 1, D), normed and turned."""
        norm, split = pre_norm(module), (-1, 1, module.head_dim)
        turned = module.num_heads + module.num_kv_heads
        gain, rotary, turn = _head_gain(module), module.rope_theta is not None, self._turn

        def heads_of(x: Tensor) -> Tensor:
            heads = qkv(norm(x)).view(split)
            if gain is not None:
                heads = torch.cat((gain(heads[:turned]), heads[turned:]))
            return turn(heads) if rotary else heads

        return heads_of

    def _state_of(self, module: MatrixAttention) -> Oracle:
        out = product(module.out.weight, module.out.bias)
        assert self._scratch is not None
        scratch, kept = self._scratch, self._scratch.heads
        flat = kept.view(1, 1, -1)
        heads_of = self._heads(module, product(module.qkv.weight, module.qkv.bias, flat))
        in_place = module.q_norm is None and module.rope_theta is None

        def oracle(x: Tensor) -> Tensor:
            heads = heads_of(x)
            if not in_place:
                kept.copy_(heads)
            slot = self._slot
            self._slot += 1
            state = self._states[slot]
            if type(state) is not OneState:  # the first time
                state = OneState(module, state, self._shared, scratch)
                self._states[slot] = state
            return out(state())

        return oracle


def _copied(cache: KeyValueCache, length: int) -> Tensor:
    """Keys and values of every slot in one: (slots, 2, H_kv, room, D)."""
    slots = cache.slots
    store = slots[0][0].new_empty(len(slots), 2, *slots[0][0].shape[1:])
    for slot, (keys, values) in enumerate(slots):
        store[slot, 0, :, :length] = keys[0, :, :length]
        store[slot, 1, :, :length] = values[0, :, :length]
    return store


def _head_gain(module: Attention) -> Callable[[Tensor], Tensor] | None:
    """The norms of queries and keys as one: (H + H_kv, 1, D) → the same."""
    if module.q_norm is None or module.k_norm is None:
        return None
    queries = module.num_heads
    of_queries, of_keys = ready_norm(module.q_norm), ready_norm(module.k_norm)
    return lambda heads: torch.cat((of_queries(heads[:queries]), of_keys(heads[queries:])))


def _mlp(module: MLP) -> Oracle:
    norm, activation = pre_norm(module), module.activation
    up: Tensor = module.up.weight
    down: Tensor = module.down.weight
    up_bias: Tensor | None = module.up.bias
    if module.gate is None and activation is F.gelu and not (is_large(up) or is_large(down)):
        # gelu(√2u) = (u + u·erf u)/√2: torch's gelu goes through oneDNN, and its call costs more
        # than the arithmetic on so few numbers (5.3 against 2.3 µs for 512)
        up, down, activation = up * math.sqrt(0.5), down * math.sqrt(0.5), _with_erf
        up_bias = None if up_bias is None else up_bias * math.sqrt(0.5)
    rise, fall = product(up, up_bias), product(down, module.down.bias)
    if module.gate is None:
        return lambda x: fall(activation(rise(norm(x))))
    gate = product(module.gate.weight, module.gate.bias)

    def gated(x: Tensor) -> Tensor:
        y = norm(x)
        return fall(activation(gate(y)) * rise(y))

    return gated


def _with_erf(u: Tensor) -> Tensor:
    return torch.addcmul(u, u, torch.erf(u))


def _both(attention: Oracle, mlp: Oracle) -> Oracle:
    return lambda x: attention(x) + mlp(x)


def _reinjected(block: Any) -> Step:
    return lambda x, state, oracle: (block.reinjected(x, state), state)


def _normed(step: Step, norm: Callable[[Tensor], Tensor]) -> Step:
    def normed(x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        x, state = step(x, state, oracle)
        return norm(x), state

    return normed
