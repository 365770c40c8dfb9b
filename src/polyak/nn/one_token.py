r"""Decoding one token of one sequence: the same function with little but its kernels.

On a small model, a token's arithmetic takes less time than the calls around it: modules, scalars
mapped anew by each substep, checks for transforms that cannot occur here. Rules step as they are
written; what they find as their scalars and norm are values made ready once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak import ops
from polyak.nn.cache import KeyValueCache
from polyak.nn.oracles import MLP, Attention
from polyak.nn.splitting import SUBSTEPS
from polyak.nn.transformer import Embedding, Transformer
from polyak.rules import Oracle, UpdateRule
from polyak.rules._declarations import LayerNorm

Start = Callable[[Tensor, int], Tensor]
LARGE = 1 << 18
"""Numbers in a matrix from which on it is worth laying out for products with one vector."""


class OneToken:
    """Logits after one more token, for one sequence without padding.

    Made for weights as they are now; make another where they change.

    Args:
        model: in evaluation mode; see `supports`.
        cache: of the sequence so far; its contents are copied.
    """

    def __init__(self, model: Transformer, cache: KeyValueCache) -> None:
        self._position = cache.get_seq_length()
        self._stores = [torch.stack(slot) for slot in cache.slots]  # (2, 1, H, length, D)
        self._slot = 0
        config = model.config
        self._layers = []
        for block in model.blocks:
            attention = self._attention(block.attention)  # type: ignore[arg-type]
            mlp = _mlp(block.mlp)  # type: ignore[arg-type]
            oracles = {"attention": attention, "mlp": mlp, "layer": _both(attention, mlp)}
            for substep in SUBSTEPS[config.splitting]:
                rule = block.rules[substep]  # type: ignore[index]
                self._layers.append((_ready(rule).step, oracles[substep]))  # type: ignore[arg-type]
        self._embedding = _lookup(model.embedding)
        self._state = model.rule.State
        example = model.embedding.tokens.weight[None, :1]
        self._starts: list[tuple[str, Start]] = []
        for stream in model.rule.streams:
            if stream.name in model.streams:
                start = _lookup(model.streams[stream.name])  # type: ignore[arg-type]
            elif stream.start == "embedding":
                start = _constant(torch.zeros_like(example))
            else:
                start = _constant(stream.constant(example, config.num_heads))
            self._starts.append((stream.name, start))
        self._norm = _ReadyNorm(model.norm)
        self._head = _in_long_runs(model.head.weight), model.head.bias

    @staticmethod
    def supports(model: Transformer) -> bool:
        """Whether this model is made of what is known here: learned positions, LayerNorm, plain
        multi-head attention and an MLP of two matrices."""
        for block in model.blocks:
            attention: Any = block.attention
            mlp: Any = block.mlp
            if (
                type(attention) is not Attention
                or type(mlp) is not MLP
                or type(attention.norm) is not LayerNorm
                or type(mlp.norm) is not LayerNorm
                or getattr(attention, "num_kv_heads", attention.num_heads) != attention.num_heads
                or getattr(attention, "rope_theta", None) is not None
                or getattr(attention, "q_norm", None) is not None
                or getattr(mlp, "gate", None) is not None
            ):
                return False
        tables = [model.embedding, *model.streams.values()]
        return type(model.norm) is LayerNorm and all(
            type(table) is Embedding and isinstance(getattr(table, "positions", None), nn.Embedding)
            for table in tables
        )

    def logits(self, token: Tensor) -> Tensor:
        """Logits (1, V) after the token (1,), which is read and kept."""
        ids, self._slot, position = token[None], 0, self._position
        x = self._embedding(ids, position)
        state = self._state(**{name: start(ids, position) for name, start in self._starts})
        for step, oracle in self._layers:
            x, state = step(x, state, oracle)
        self._position += 1
        return F.linear(self._norm(x)[0], *self._head)

    def _attention(self, module: Attention) -> Oracle:
        norm, shape = _ReadyNorm(module.norm), (3, 1, module.num_heads, 1, -1)
        qkv, qkv_bias = _in_long_runs(module.qkv.weight), module.qkv.bias
        out, out_bias = _in_long_runs(module.out.weight), module.out.bias
        linear, attend = F.linear, F.scaled_dot_product_attention

        def oracle(x: Tensor) -> Tensor:
            heads = linear(norm(x), qkv, qkv_bias).view(shape)
            store = self._stores[self._slot]
            self._slot += 1
            store.narrow(3, self._position, 1).copy_(heads.narrow(0, 1, 2))
            keys, values = store.narrow(3, 0, self._position + 1).unbind(0)
            y = attend(heads.select(0, 0), keys, values)
            return linear(y.reshape(x.shape), out, out_bias)

        return oracle


def _mlp(module: MLP) -> Oracle:
    norm, linear = _ReadyNorm(module.norm), F.linear
    activation = getattr(module, "activation", F.gelu)
    up, up_bias = _in_long_runs(module.up.weight), module.up.bias
    down, down_bias = _in_long_runs(module.down.weight), module.down.bias

    def oracle(x: Tensor) -> Tensor:
        return linear(activation(linear(norm(x), up, up_bias)), down, down_bias)

    return oracle


def _in_long_runs(weight: Tensor) -> Tensor:
    """The same (out, in) matrix, its columns contiguous: a copy, made once.

    A product with one vector then reads long runs of memory and adds them up, measured a third
    faster on a CPU than dot products with rows of 768. The copy takes what some 25 tokens of a
    124M model gain, and as much memory as the weights. Small matrices stay in the cache anyway.
    """
    if weight.device.type != "cpu" or weight.numel() < LARGE:
        return weight
    return weight.detach().t().contiguous().t()


def _both(attention: Oracle, mlp: Oracle) -> Oracle:
    return lambda x: attention(x) + mlp(x)


def _lookup(table: Embedding) -> Start:
    assert table.positions is not None, "see OneToken.supports"
    tokens, positions = table.tokens.weight, table.positions.weight
    return lambda ids, position: F.embedding(ids, tokens) + positions.narrow(0, position, 1)


def _constant(value: Tensor) -> Start:
    return lambda ids, position: value


def _ready(rule: UpdateRule) -> UpdateRule:
    """A rule that computes the same, its scalars and norms being values (see `Scalar.__get__`)."""
    ready: UpdateRule = object.__new__(type(rule))
    ready.__dict__.update(rule.__dict__)
    for name in type(rule).present_scalars(rule.options):
        ready.__dict__[name] = getattr(rule, name)
    for name in type(rule).norms:
        module = getattr(rule, name)
        ready.__dict__[name] = _ReadyNorm(module) if type(module) is LayerNorm else module
    return ready


class _ReadyNorm:
    """A LayerNorm's two methods without a module around them."""

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, LayerNorm), "see OneToken.supports"
        self.weight, self.bias, self.eps = module.weight, module.bias, module.eps
        self.shape = module.weight.shape
        self._beta: Tensor | None = None
        self._gamma: Tensor | None = None
        self._ratio, self._eps = 0.0, 0.0

    def __call__(self, u: Tensor) -> Tensor:
        return torch.layer_norm(u, self.shape, self.weight, self.bias, self.eps)

    def combine(self, beta: Tensor, v: Tensor, gamma: Tensor, g: Tensor) -> Tensor:
        """As `ops.momentum_norm` does where β and γ are numbers; they are read once."""
        if beta is not self._beta or gamma is not self._gamma:
            if not ops.numbers_serve(beta, v, gamma, g):
                return ops.momentum_norm(beta, v, gamma, g, self.weight, self.bias, self.eps)
            self._beta, self._gamma = beta, gamma
            self._ratio, self._eps = float(beta) / float(gamma), self.eps / float(gamma) ** 2
        u = torch.add(g, v, alpha=self._ratio)
        return torch.layer_norm(u, self.shape, self.weight, self.bias, self._eps)
