r"""Derivatives of a substep token by token: of its oracle, of its state, and of one coordinate.

A substep is causal, so the Jacobian of z = (x, v, …) ↦ z′ is block lower triangular over tokens.
Rules move tokens one by one: the diagonal block B_i = ∂z′_i/∂z_i is the derivative of one step
whose oracle is y ↦ O + J_ii (y − y₀), J_ii = ∂O_i/∂y_i. Matrix streams are held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vmap

from polyak.analysis._common import math_attention
from polyak.analysis.dynamics.asymmetry import Field
from polyak.analysis.dynamics.trajectory import Substep
from polyak.nn.splitting import norm_after

AT_ONCE = 32
"""Copies of a sequence in one product."""
DIRECTIONS = 4
"""Random directions whose average gives M."""
Answer = Callable[[int, Tensor], Tensor]
"""(number of the call, y − y₀) → what the oracle's answer changes by, (1, m, d) both."""


@dataclass(frozen=True)
class Some:
    """Some tokens of one sequence.

    Attributes:
        sequence: its place in the batch.
        places: (m,), of the tokens.
    """

    sequence: int
    places: Tensor

    def of(self, value: Tensor) -> Tensor:
        """(B, T, …) → (1, m, …)."""
        return value[self.sequence : self.sequence + 1, self.places]


def vectors(substep: Substep) -> list[str]:
    """The rule's streams that are a vector for each token; matrix streams are held fixed."""
    streams = substep.rule.streams
    return [s.name for s in streams if getattr(substep.state, s.name).dim() == 3]


def own_blocks(substep: Substep, call: int, some: Some) -> Tensor:
    """J_ii of the oracle at some tokens, (m, d, d), rows of outputs."""
    point = substep.points[call][some.sequence : some.sequence + 1]
    d = point.shape[-1]
    basis = torch.eye(d).to(point)
    with torch.no_grad(), math_attention():
        if substep.kind == "mlp":  # its tokens do not see each other: all at once
            copies = some.of(substep.points[call]).repeat(d, 1, 1)
            tangent = basis[:, None].repeat(1, len(some.places), 1)
            rows: Tensor = jvp(substep.oracle, (copies,), (tangent,))[1]
            return rows.permute(1, 2, 0)
        blocks = []
        for place in some.places.tolist():
            columns = []
            for part in torch.split(basis, AT_ONCE):
                copies = point.repeat(len(part), 1, 1)
                tangent = torch.zeros_like(copies)
                tangent[:, place] = part
                columns.append(jvp(substep.oracle, (copies,), (tangent,))[1][:, place])
            blocks.append(torch.cat(columns).T)
    return torch.stack(blocks)


def _step(substep: Substep, some: Some, answer: Answer) -> tuple[Tensor, Field]:
    """A substep at some tokens with a linear oracle: its point (1 + k, m, d), and z ↦ z′."""
    names, x = vectors(substep), some.of(substep.x)
    state = type(substep.state)(*(some.of(value) for value in substep.state))
    points, values = ([some.of(v) for v in part] for part in (substep.points, substep.values))
    block = substep.block

    def moved(z: Tensor) -> Tensor:
        calls = iter(range(len(points)))

        def oracle(y: Tensor) -> Tensor:
            call = next(calls)
            return values[call] + answer(call, y - points[call])

        given = dict(zip(names, z[1:, None].unbind(0), strict=True))
        own = type(substep.rule).step
        after, streams = own(substep.rule, z[:1], state.replace(**given), oracle)
        if block.post_norm:
            after = norm_after(substep.kind, block.attention, block.mlp)(after)
        return torch.cat([after, *(getattr(streams, name) for name in names)])

    return torch.cat([x, *(getattr(state, name) for name in names)]), moved


def state_blocks(substep: Substep, some: Some, own: Sequence[Tensor]) -> Tensor:
    """B_i at some tokens, (m, (1 + k)·d, (1 + k)·d): x first, then the vector streams.

    Args:
        substep: the step.
        some: the tokens.
        own: J_ii of every call of the oracle.
    """
    point, moved = _step(
        substep, some, lambda call, change: torch.einsum("mij,bmj->bmi", own[call], change)
    )
    parts, tokens, d = point.shape
    basis = torch.eye(parts * d).to(point).unflatten(1, (parts, d))  # type: ignore[no-untyped-call]
    tangents = basis[:, :, None].expand(-1, -1, tokens, -1)
    with torch.no_grad():
        columns = vmap(lambda t: jvp(moved, (point,), (t,))[1], chunk_size=AT_ONCE)(tangents)
    found: Tensor = columns.permute(2, 1, 3, 0).flatten(1, 2)
    return found


def local_maps(substep: Substep, some: Some, scale: float, generator: torch.Generator) -> Tensor:
    """M(scale) of every token, (m, 1 + k, 1 + k): its entries ⟨z, ∂z′_a/∂z_b z⟩/‖z‖², averaged."""
    point, moved = _step(substep, some, lambda _, change: scale * change)
    parts, tokens, d = point.shape
    total = torch.zeros(tokens, parts, parts).to(point)
    for _ in range(DIRECTIONS):
        z = torch.randn(tokens, d, generator=generator, dtype=torch.float64).to(point)
        for column in range(parts):
            tangent = torch.zeros_like(point)
            tangent[column] = z
            with torch.no_grad():
                change = jvp(moved, (point,), (tangent,))[1]
            total[:, :, column] += ((change * z).sum(-1) / z.square().sum(-1)).T
    return total / DIRECTIONS
