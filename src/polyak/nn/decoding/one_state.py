r"""One token of attention with a matrix state, for one sequence, with little but its kernels.

What `polyak.ops` computes in a step, without its checks: the state is this module's own copy and is
written into, and so are a few tensors that hold a token's results, shared by all layers. The sum of
keys Z is a last column of S, so that one product reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.nn.attention import Attention
from polyak.nn.attention._matrix import MatrixAttention
from polyak.nn.attention.adaptive_momentum import AdaptiveMomentumAttention
from polyak.nn.attention.linear import LinearAttention
from polyak.nn.attention.momentum import MomentumAttention
from polyak.nn.context import Context
from polyak.ops import FEATURE_MAPS, LARGEST_MU, AttentionState

KINDS: tuple[type[Attention], ...] = (
    LinearAttention,
    MomentumAttention,
    AdaptiveMomentumAttention,
)
"""The kinds that are known here."""


class Scratch:
    """Where a token's results are written, by one layer after the other."""

    def __init__(self, module: Attention, like: Tensor) -> None:
        groups, d = module.num_kv_heads, module.head_dim
        self._mapped = like.new_empty(module.num_heads + groups, 1, d)
        self._above = torch.empty_like(self._mapped)
        self._one = like.new_ones(())
        self.queries = self._mapped[: module.num_heads].view(groups, -1, d)
        self.keys = self._mapped[module.num_heads :].view(groups, d, 1)
        self.values = like.new_ones(groups, 1, d + 1)  # the last column stays 1
        self.plain_values = self.values[..., :d]
        self.sums = like.new_empty(groups, module.num_heads // groups, d + 1)
        self.numerator, self.divisor = self.sums[..., :d], self.sums[..., d:]
        self.flat = like.new_empty(1, 1, module.num_heads * d)
        self.read = self.flat.view(groups, -1, d)

    def feature_map(self, name: str) -> Callable[[Tensor], Any]:
        """φ of queries and keys (H + H_kv, 1, D), into `queries` and `keys`."""
        mapped, above, one = self._mapped, self._above, self._one
        if name != "elu1":
            apply = FEATURE_MAPS[name].apply
            return lambda x: mapped.copy_(apply(x))

        def elu1(x: Tensor) -> None:
            # min(eˣ, max(x, 0) + 1), which is elu(x) + 1 with every digit
            torch.exp(x, out=mapped)
            torch.clamp_min(x, 0, out=above)
            torch.minimum(mapped, above.add_(one), out=mapped)

        return elu1


class OneState:
    """The state of one call of attention, which moves on with every token.

    Args:
        module: of a kind of `KINDS`.
        state: of the tokens so far, of one sequence; its contents are copied.
        shared: raw coefficients of the whole model.
        scratch: see `Scratch`.
    """

    def __init__(
        self,
        module: MatrixAttention,
        state: AttentionState,
        shared: Mapping[str, Tensor],
        scratch: Scratch,
    ) -> None:
        options = {"weighted_normalizer": False, **module.options}
        self._at, self._turned = scratch, module.num_heads + module.num_kv_heads
        self._map = scratch.feature_map(options["feature_map"])
        width = module.head_dim
        s, z = state.S[0], state.Z[0][..., None]
        self._weighted = options["weighted_normalizer"]
        self._normalized = options["normalize"]
        joined = self._normalized and not self._weighted
        self._s = torch.cat((s, z), dim=-1) if joined else s.clone()
        self._sums = self._s[..., : s.shape[-1]]
        self._keys = self._s[..., width:] if joined else None
        self._p = None if state.P is None else -state.P[0]  # S grows by it
        self._move = self._mover(module, state, Context(shared=shared))
        factor = 1.0 if options["scale"] == "none" else width**-0.5
        self._factor = s.new_tensor(factor)
        self._eps = s.new_zeros(1, 1, width + 1)
        self._eps[..., width] = options["eps"] / factor

    def __call__(self, heads: Tensor) -> Tensor:
        """Queries, keys and values (H + 2H_kv, 1, D) → what is read (1, 1, H·D), until the next."""
        at, turned = self._at, self._turned
        self._map(heads[:turned])
        self._move(heads[turned:])
        if not self._normalized:
            torch.bmm(at.queries, self._s, out=at.read).mul_(self._factor)
            return at.flat
        torch.baddbmm(self._eps, at.queries, self._s, out=at.sums)
        torch.div(at.numerator, at.divisor, out=at.read)
        return at.flat

    def _mover(
        self, module: MatrixAttention, state: AttentionState, context: Context
    ) -> Callable[[Tensor], None]:
        """How the state takes in a token, given its values (H_kv, 1, D)."""
        at, s, sums, keys, p = self._at, self._s, self._sums, self._keys, self._p
        if p is None:
            if keys is None:

                def add(v: Tensor) -> None:
                    s.baddbmm_(at.keys, v)

                return add

            def add_both(v: Tensor) -> None:
                at.plain_values.copy_(v)
                s.baddbmm_(at.keys, at.values)

            return add_both
        gamma = _coefficient(module, "gamma", context, s)
        if isinstance(module, AdaptiveMomentumAttention):
            return self._adaptive(module, state, gamma)
        mu, alike = _coefficient(module, "mu", context, s), False
        beta = alpha = 1.0
        if mu.numel() == gamma.numel() == 1:
            alike, beta, alpha = True, float(mu), float(gamma)
        weighted = self._weighted

        def move(v: Tensor) -> None:
            if weighted:
                at.plain_values.copy_(v)
                v = at.values
            if alike:
                p.baddbmm_(at.keys, v, beta=beta, alpha=alpha)
            else:
                p.mul_(mu).baddbmm_(at.keys, v * gamma)
            sums.add_(p)
            if keys is not None:
                keys.add_(at.keys)

        return move

    def _adaptive(
        self, module: AdaptiveMomentumAttention, state: AttentionState, gamma: Tensor
    ) -> Callable[[Tensor], None]:
        assert state.P is not None
        assert state.key is not None
        assert state.value is not None
        assert state.seen is not None
        at, sums, keys = self._at, self._sums, self._keys
        heads, rest = state.P.shape[1], state.P[0, 0].numel()
        both = state.P.new_empty(2, *state.P.shape[1:])
        change, p = both.unbind(0)
        p.copy_(-state.P[0])
        flat = both.view(2, heads, rest)
        now = state.key[0][..., None] * state.value[0][:, None]
        before, new = now, torch.empty_like(now)
        root, one, most = gamma.sqrt(), p.new_ones(()), p.new_tensor(LARGEST_MU)
        tiny = p.new_tensor(torch.finfo(p.dtype).tiny)
        first = bool(state.seen[0] == 0) and module.first_step == "unit"

        def move(v: Tensor) -> None:
            nonlocal before, new, first
            torch.bmm(at.keys, v, out=new)
            torch.sub(new, before, out=change)
            norms = torch.linalg.vector_norm(flat, dim=-1)
            # where P is 0 any μ serves: it is not NaN
            ratio = torch.div(norms[0], torch.maximum(norms[1], tiny))[:, None, None]
            mu = torch.minimum((one - ratio.sqrt_().mul_(root)).square_(), most)
            p.mul_(mu).addcmul_(new, one if first else gamma)
            sums.add_(p)
            if keys is not None:
                keys.add_(at.keys)
            before, new, first = new, before, False

        return move


def _coefficient(module: Attention, name: str, context: Context, like: Tensor) -> Tensor:
    """μ or γ as (1, 1, 1) or (H_kv, 1, 1)."""
    value = torch.as_tensor(module.coefficient(name, context), dtype=torch.float64)
    return value.detach().to(like.dtype).reshape(-1, 1, 1)
