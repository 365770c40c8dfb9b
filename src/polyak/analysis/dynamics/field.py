r"""Is an oracle a gradient? Its Jacobian's symmetry at the points where the rule asks it.

Causal attention cannot be: its J is block lower triangular over tokens. What could be is each
token's own part, J_ii. Beside O itself: its `core`, O without the norm in front of it, at z = LN y;
and NᵀJ with N = ∂LN/∂y, which is symmetric where O is ∇E of some E read through LN (`metric`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.analysis.dynamics.asymmetry import (
    Asymmetry,
    Field,
    Metric,
    SymmetricPart,
    asymmetry,
    derivative,
    sums,
    symmetric_part,
)
from polyak.analysis.dynamics.loops import Circulation, circulation
from polyak.analysis.dynamics.summaries import check_sequences
from polyak.analysis.dynamics.trajectory import Substep, Trajectory, Watched
from polyak.errors import ConfigError
from polyak.nn.transformer import Transformer

SCALES = (0.01, 1.0)
"""Sides of loops, relative to real updates."""
NULL_SIZE = 1024
"""Rows of the random matrices at most."""


@dataclass(frozen=True, kw_only=True)
class FieldOf:
    """One substep's oracle.

    Attributes:
        oracle: O, with its pre-norm.
        core: O without it; None in post-norm models and where one step asks both oracles.
        metric: NᵀJ; None likewise.
        symmetric: (J + Jᵀ)/2 of O.
        loops: by `updates/SCALE`, around this update and the next one's (the last one's: the one
            before), and `random/SCALE`, around random sides of the same lengths.
    """

    oracle: Asymmetry
    core: Asymmetry | None
    metric: Asymmetry | None
    symmetric: SymmetricPart
    loops: dict[str, Circulation]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_oracles(watched: Watched) -> None:
    """See that the model says where its oracles are.

    Raises:
        ConfigError: it is a plain Hugging Face model.
    """
    if not watched.ours:
        raise ConfigError(
            f"field and stability are of polyak's models, and the blocks of "
            f"{type(watched.original).__name__} are not taken apart; curve and path are for it, too"
        )


def field_of(
    watched: Watched,
    ids: Tensor,
    place: int,
    *,
    probes: int = 4,
    own_tokens: int = 16,
    seed: int = 0,
) -> FieldOf:
    """How far the oracle of one substep is from a gradient.

    Args:
        watched: the model.
        ids: (N, T) inputs, N ≥ 2.
        place: of the substep, from 0.
        probes: vectors of random signs for each sequence, at least 2.
        own_tokens: tokens tried for each probe's own-token part.
        seed: of the random vectors.

    Raises:
        ConfigError: a plain Hugging Face model; see `Watched`.
        DataError: one sequence.
    """
    check_oracles(watched)
    check_sequences(ids)
    made = watched.run(ids)
    substep = made.substeps[place]
    point = substep.points[0]
    generator = torch.Generator().manual_seed(seed)
    own = None if substep.kind == "mlp" else own_tokens  # an MLP's tokens do not see each other
    size = point[0].numel()

    def measured(function: Field, points: Tensor, norm: Field | None = None) -> Asymmetry:
        rows = []
        for one in torch.split(points, 1):
            products = None
            if norm is not None:
                products = Metric(derivative(function, one), derivative(norm, one))
            rows.append(
                sums(
                    function,
                    one,
                    probes=probes,
                    own_tokens=own,
                    generator=generator,
                    products=products,
                )
            )
        return asymmetry(np.stack(rows), size)

    core = metric = None
    module = _module(substep)
    if module is not None:
        with torch.no_grad():
            z = module.norm(point)
        core = measured(_core(substep, module), z)
        metric = measured(substep.oracle, point, module.norm)
    return FieldOf(
        oracle=measured(substep.oracle, point),
        core=core,
        metric=metric,
        symmetric=symmetric_part([(substep.oracle, one) for one in torch.split(point, 1)], seed),
        loops=_loops(made, place, generator),
    )


def _module(substep: Substep) -> Any:
    """The oracle, if it is one and has a norm in front of it."""
    module = getattr(substep.block, substep.kind, None)
    return module if getattr(module, "pre_norm", False) else None


def _core(substep: Substep, module: Any) -> Field:
    def core(z: Tensor) -> Tensor:
        with _without_norm(module):
            return substep.oracle(z)

    return core


@contextmanager
def _without_norm(module: Any) -> Iterator[None]:
    module.pre_norm = False
    try:
        yield
    finally:
        module.pre_norm = True


def _loops(made: Trajectory, place: int, generator: torch.Generator) -> dict[str, Circulation]:
    updates, substep = made.updates, made.substeps[place]
    a = updates[place]
    b = updates[place + 1 if place + 1 < len(updates) else place - 1]
    drawn = [
        torch.randn(side.shape, generator=generator, dtype=torch.float64).to(side)
        for side in (a, b)
    ]
    pairs = {
        "updates": (a, b),
        "random": tuple(_as_long(u, side) for u, side in zip(drawn, (a, b), strict=True)),
    }
    return {
        f"{name}/{scale:g}": circulation(
            substep.oracle, substep.points[0], scale * one, scale * other
        )
        for name, (one, other) in pairs.items()
        for scale in SCALES
    }


def _as_long(vector: Tensor, other: Tensor) -> Tensor:
    """`vector` with the length of `other` in every sequence."""
    sizes = [v.flatten(1).norm(dim=1)[:, None, None] for v in (other, vector)]
    scaled: Tensor = vector * sizes[0] / sizes[1]
    return scaled


def untrained(model: Transformer, seed: int) -> Transformer:
    """A model of the same configuration, freshly drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Transformer(model.config)
    made.init_weights(seed)
    device = next(model.parameters()).device
    return made.to(device).eval()


def random_matrices(
    tokens: int, width: int, *, sequences: int, probes: int, seed: int
) -> dict[str, Asymmetry]:
    """The same numbers of matrices with independent normal entries: `random`, and `triangular`.

    The second is block lower triangular over tokens, as the J of causal attention is. There are as
    many tokens as `NULL_SIZE` rows have room for.
    """
    tokens = max(2, min(tokens, NULL_SIZE // width))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    found: dict[str, list[Any]] = {"random": [], "triangular": []}
    for _ in range(sequences):
        drawn = torch.randn(tokens, width, tokens, width, generator=generator, dtype=torch.float64)
        for name, matrix in (("random", drawn), ("triangular", drawn * mask[:, None, :, None])):

            def linear(x: Tensor, matrix: Tensor = matrix) -> Tensor:
                return torch.einsum("icjd,bjd->bic", matrix, x)

            point = torch.zeros(1, tokens, width, dtype=torch.float64)
            found[name].append(
                sums(linear, point, probes=probes, own_tokens=tokens, generator=generator)
            )
    return {name: asymmetry(np.stack(rows), tokens * width) for name, rows in found.items()}
