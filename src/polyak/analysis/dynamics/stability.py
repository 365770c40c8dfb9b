r"""Does a substep contract? Its state map token by token, and the product of all so far.

Eigenvalues of a causal map's Jacobian are those of its diagonal blocks B_i (see `blocks`), and the
diagonal blocks of a product of causal maps are the products of theirs: both are exact.

The region of a rule: put a number λ in the place of J_ii. Where a norm's derivative acts as a
number p, a substep is M(λ) = M₀ + λM₁ for each coordinate, of triple momentum

    M = [[1 + νs, ν(a + sμ)], [s, a + sμ]],  a = pβ, s = pγλ,

and (token, λ) is inside iff the spectral radius of M is below 1. Here M's entries are the step's
own derivatives along random directions, and λ runs over J_ii's eigenvalues, which are complex.
For real λ > 0 no rule of the family is inside, since 1 − tr M + det M = −νs.

Streams are measured in units that make them as large as x: a norm of (x, v) needs common units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.analysis.dynamics.asymmetry import spaced
from polyak.analysis.dynamics.blocks import Some, local_maps, own_blocks, state_blocks, vectors
from polyak.analysis.dynamics.field import check_oracles
from polyak.analysis.dynamics.summaries import Summary, check_sequences, summary
from polyak.analysis.dynamics.trajectory import Substep, Trajectory, Watched

TOKENS = 4
"""Tokens of each sequence that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Numbers of every substep, by `POINT/NAME`, POINT from 1.

    NAME is `radius` ρ(B), `norm` ‖B‖₂, `departure` √(1 − Σ|λ|²/‖B‖²_F) (0: normal); from the start
    to here `log_product` ln‖Π‖₂, `log_norms` Σ ln‖B‖₂, `log_radii` Σ ln ρ(B); `inside` and
    `ascending`, shares of (token, λ) inside the region and with Re λ > 0; and `retention`, M₀'s a.
    """

    labels: tuple[str, ...]
    numbers: dict[str, Summary]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "labels": list(self.labels),
            "numbers": {name: one.to_dict() for name, one in self.numbers.items()},
        }


def stability(watched: Watched, ids: Tensor, *, tokens: int = TOKENS, seed: int = 0) -> Stability:
    """Spectra of every substep's state map, and of their product, for some tokens.

    Args:
        watched: the model.
        ids: (N, T) inputs, N ≥ 2.
        tokens: of each sequence, evenly spaced from a random place.
        seed: of the places and directions.

    Raises:
        ConfigError: a plain Hugging Face model; see `Watched`.
        DataError: one sequence.
    """
    check_oracles(watched)
    check_sequences(ids)
    generator = torch.Generator().manual_seed(seed)
    made = watched.run(ids)
    names = list(dict.fromkeys(name for step in made.substeps for name in vectors(step)))
    found: dict[str, list[Tensor]] = {}
    for sequence in range(len(ids)):
        some = Some(sequence, spaced(ids.shape[1], tokens, generator))
        units = _first_units(made, names, sequence)
        along = torch.eye((1 + len(names)) * made.xs[0].shape[-1]).to(made.xs[0])
        radii = norms = torch.zeros(len(some.places), dtype=torch.float64)
        for place, substep in enumerate(made.substeps):
            own = [own_blocks(substep, call, some) for call in range(len(substep.points))]
            block = _embedded(state_blocks(substep, some, own), vectors(substep), names)
            before = [1.0, *units.values()]
            units |= _units(substep.after, vectors(substep), made.xs[place + 1], sequence)
            numbers = _spectrum(_scaled(block, before, before))
            block = _scaled(block, before, [1.0, *units.values()])
            along = block @ along
            numbers["norm"] = _norm(block)
            radii = radii + numbers["radius"].log()
            norms = norms + numbers["norm"].log()
            numbers["log_product"] = _norm(along).log()
            numbers |= {"log_norms": norms, "log_radii": radii}
            numbers |= _region(substep, some, own, generator)
            for name, value in numbers.items():
                found.setdefault(f"{place + 1}/{name}", []).append(value)
    return Stability(
        labels=tuple(watched.labels),
        numbers={name: summary(torch.stack(values)) for name, values in found.items()},
    )


def _region(
    substep: Substep, some: Some, own: Sequence[Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Where every eigenvalue of J_ii lies, of a rule that asks once."""
    if len(own) != 1:
        return {}
    at0, at1 = (local_maps(substep, some, scale, generator.clone_state()) for scale in (0.0, 1.0))
    values = torch.linalg.eigvals(own[0])
    maps = at0[:, None] + values[..., None, None] * (at1 - at0)[:, None]
    radius = torch.linalg.eigvals(maps).abs().amax(-1)
    found = {
        "inside": (radius < 1).double().mean(-1),
        "ascending": (values.real > 0).double().mean(-1),
    }
    return found if len(at0[0]) == 1 else {**found, "retention": at0[:, 1, 1]}


def _spectrum(block: Tensor) -> dict[str, Tensor]:
    values = torch.linalg.eigvals(block).abs()
    size = block.flatten(1).square().sum(1)
    return {
        "radius": values.amax(-1),
        "departure": (1 - values.square().sum(-1) / size).clamp(min=0).sqrt(),
    }


def _norm(block: Tensor) -> Tensor:
    found: Tensor = torch.linalg.matrix_norm(block, 2)
    return found


def _embedded(block: Tensor, own: Sequence[str], names: Sequence[str]) -> Tensor:
    """In the coordinates of all streams; those of other rules pass through."""
    d = block.shape[-1] // (1 + len(own))
    parts = [0, *(1 + names.index(name) for name in own)]
    places = torch.cat([torch.arange(part * d, (part + 1) * d) for part in parts])
    whole = torch.eye((1 + len(names)) * d).to(block).repeat(len(block), 1, 1)
    whole[:, places[:, None], places] = block
    return whole


def _units(state: Any, names: Sequence[str], x: Tensor, sequence: int) -> dict[str, float]:
    """By stream: rms of x over rms of the stream, by which it is made as large as x."""

    def rms(value: Tensor) -> float:
        return float(value[sequence].square().mean().sqrt())

    return {name: rms(x) / (rms(getattr(state, name)) or rms(x)) for name in names}


def _first_units(made: Trajectory, names: Sequence[str], sequence: int) -> dict[str, float]:
    units: dict[str, float] = {}
    for substep in reversed(made.substeps):
        units |= _units(substep.state, vectors(substep), made.xs[0], sequence)
    return {name: units[name] for name in names}


def _scaled(block: Tensor, before: Sequence[float], after: Sequence[float]) -> Tensor:
    d = block.shape[-1] // len(before)
    left, right = (torch.tensor(units).to(block).repeat_interleave(d) for units in (after, before))
    return left[:, None] * block / right
