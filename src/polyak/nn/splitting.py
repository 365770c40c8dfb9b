r"""Splitting schemes: in which substeps a layer calls its oracles.

With oracles A (attention) and M (MLP), one layer of a rule S(x; O) is

- `lie_trotter`: x ← S(x; A), then x ← S(x; M), two steps with their own scalars and norms;
- `simultaneous`: x ← S(x; A + M), one step on both oracles at the same point (Euler).

In a post-norm model each substep ends with x ← LN(x), by the norm of the oracle it called.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from polyak.nn.attention import Attention
from polyak.nn.context import Context
from polyak.nn.mlp import MLP
from polyak.rules import Oracle
from polyak.rules._norms import LayerNorm, RMSNorm


def oracle_of(
    substep: str, attention: Attention, mlp: MLP, context: Context | None = None
) -> Oracle:
    """The oracle that a substep calls: (B, T, d) → (B, T, d)."""
    attend: Oracle = attention if context is None else partial(attention, context=context)

    def both(x: Tensor) -> Tensor:
        return attend(x) + mlp(x)  # type: ignore[no-any-return]

    oracles: dict[str, Oracle] = {"attention": attend, "mlp": mlp, "layer": both}
    return oracles[substep]


def norm_after(substep: str, attention: Attention, mlp: MLP) -> LayerNorm | RMSNorm:
    """The norm of x that ends a substep of a post-norm model."""
    return attention.norm if substep == "attention" else mlp.norm
