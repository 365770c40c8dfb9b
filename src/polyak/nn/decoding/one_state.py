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
        turned = module.num_heads + groups
        self.heads = like.new_empty(turned + groups, 1, d)  # queries, keys and values
        self._queries_and_keys, self.given_values = self.heads[:turned], self.heads[turned:]
        self._mapped = like.new_empty(turned, 1, d)
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

    def feature_map(self, name: str) -> Callable[[], Any]:
        """φ of the queries and keys in `heads`, into `queries` and `keys`."""
        x, mapped, above, one = self._queries_and_keys, self._mapped, self._above, self._one
        if name != "elu1":
            apply = FEATURE_MAPS[name].apply
            return lambda: mapped.copy_(apply(x))

        def elu1() -> None:
            # x + 1 between 1 and eˣ, which is elu(x) + 1 with every digit
            torch.exp(x, out=mapped)
            torch.add(x, one, out=above)
            torch.clamp(above, one, mapped, out=mapped)

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
        self._at = scratch
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

    def __call__(self) -> Tensor:
        """What the queries in `Scratch.heads` read (1, 1, H·D), until the next call."""
        at = self._at
        self._map()
        self._move(at.given_values)
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
        flat, norms = both.view(2, heads, rest), p.new_empty(2, heads)
        moved, size = norms.view(2, heads, 1, 1).unbind(0)
        mu, one, most = torch.empty_like(size), p.new_ones(()), p.new_tensor(LARGEST_MU)
        # every U is times γ, which is then nowhere else but in a first step without it
        before = state.key[0][..., None] * state.value[0][:, None] * gamma
        new, plain = torch.empty_like(before), bool((gamma == 1).all())
        first = bool(state.seen[0] == 0) and module.first_step == "unit"

        def move(v: Tensor) -> None:
            nonlocal before, new, first
            torch.mul(at.keys, v if plain else v * gamma, out=new)
            torch.sub(new, before, out=change)
            torch.linalg.vector_norm(flat, dim=-1, out=norms)
            norms.sqrt_()
            torch.addcdiv(one, moved, size, value=-1, out=mu)
            # where P is 0 any μ serves: fmin leaves no NaN
            torch.fmin(mu.square_(), most, out=mu)
            if first:
                torch.div(new, gamma, out=p)
            else:
                torch.addcmul(new, p, mu, out=p)
            sums.add_(p)
            if keys is not None:
                keys.add_(at.keys)
            before, new, first = new, before, False

        return move


def _coefficient(module: Attention, name: str, context: Context, like: Tensor) -> Tensor:
    """μ or γ as (1, 1, 1) or (H_kv, 1, 1)."""
    value = torch.as_tensor(module.coefficient(name, context), dtype=torch.float64)
    return value.detach().to(like.dtype).reshape(-1, 1, 1)
