r"""Directions that a Jacobian loses by structure: found by reasoning, then checked by number.

v = LN_w(u) = w ∘ n with n = (u − mean u)/√(var u + eps). Whatever u does,

- aᵀ dv = 0 exactly for a = 1/w, because the entries of n add up to 0;
- aᵀ dv = O(eps/var) for a = n/w, because nᵀn = d·var/(var + eps) hardly changes.

So v moves in w ∘ {t : Σt = 0, nᵀt = 0}, the tangent space of the range of LN, d − 2 dimensions;
Q is an orthonormal basis of it, the complement of 1/w and n/w. LN also takes the same value at u
and u + s·1, which a map that reads x only through LN loses. RMSNorm, n = u/√(mean u² + eps), takes
no mean off: it nearly loses n/w alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polyak.analysis.jacobian.linear import Linear
from polyak.analysis.jacobian.states import States
from polyak.errors import ConfigError
from polyak.rules import UpdateRule
from polyak.rules._norms import LayerNorm, RMSNorm

NULL = {torch.float64: 1e-9, torch.float32: 1e-4}
"""A gain below this, relative to a random direction's, is rounding."""
NEAR = 0.05
"""Below this, and with n of mean square 1 to the same extent, a stream has passed an RMSNorm."""


@dataclass(frozen=True, eq=False)
class Zeros:
    """What is lost, per sequence.

    Attributes:
        enter: basis of the inputs that are not lost, (T, c, n); None for all, or as the map says.
        leave: basis of the outputs that are reached, (T, c', n'); None for all.
        exact: number of singular values that are exactly 0.
        near: number that are O(eps/variance), without them.
        exact_gain: largest gain found along the exactly lost directions, relative to that of a
            random direction: rounding.
        near_gain: the same along the nearly lost ones.
        left: the left null vectors themselves, (T, c', k): exact ones, then near ones.
        right: the right null vectors, (T, c, k).
        streams: names of the streams that pass a norm; `x` in a post-norm model.
        kept: by name of such a part, the left null vectors of its place, (T, c').
    """

    enter: Tensor | None = None
    leave: Tensor | None = None
    exact: int = 0
    near: int = 0
    exact_gain: float = 0.0
    near_gain: float = 0.0
    left: Tensor | None = None
    right: Tensor | None = None
    streams: tuple[str, ...] = ()
    kept: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Moved:
    """A part of a map's output, and the norms that it may have passed.

    Attributes:
        name: `x`, or a stream's.
        place: where it is among the output's numbers.
        value: what it is after the block, (T, d).
        norms: the norms that are tried; None for a stream that no rule of the block moves.
    """

    name: str
    place: slice
    value: Tensor
    norms: tuple[LayerNorm | RMSNorm, ...] | None


def streams_moved(states: States, after: Any, movers: Mapping[str, UpdateRule]) -> list[Moved]:
    """The vector streams of a state map: each may have passed any norm of the rule moving it last.

    Args:
        states: how streams are laid out.
        after: the state behind the block.
        movers: by name of a stream, the rule that moves it last.
    """

    def norms(name: str) -> tuple[LayerNorm | RMSNorm, ...] | None:
        if name not in movers:
            return None
        every = [getattr(movers[name], norm) for norm in movers[name].norms]
        return tuple(norm for norm in every if isinstance(norm, LayerNorm | RMSNorm))

    return [
        Moved(name, place, getattr(after, name)[0], norms(name)) for name, place in states.places()
    ]


def norm_zeros(map_: Linear, parts: list[Moved], before: Zeros | None = None) -> Zeros:
    """Of a map's output: two directions a token of every part that has passed an LN.

    Which norm a part has passed is found by trying: 1/w must be a left null vector of the Jacobian,
    to rounding; of an RMSNorm, n must have mean square 1, and n/w nearly be lost. A stream that is
    not moved leaves where it could enter: nothing of it is lost here, and what the map before it
    lost (`before`) stays lost.

    Raises:
        ConfigError: a gain is 0, so that 1/w does not exist.
    """
    exact: list[tuple[Tensor, float]] = []
    near: list[tuple[Tensor, float]] = []
    streams: list[str] = []
    kept: dict[str, tuple[Tensor, ...]] = {}
    for part in parts:
        value = part.value
        if part.norms is None and before is not None and part.name in before.kept:
            kept[part.name] = before.kept[part.name]
        for norm in part.norms or ():
            if bool((norm.weight == 0).any()):
                raise ConfigError(
                    f"a gain of the norm of {part.name!r} is exactly 0, and its range has no "
                    "basis of the usual kind; its spectrum is not defined"
                )
            n, mean, radial = _null_vectors(value, norm)
            vectors = [_placed(vector, part.place, map_.outputs) for vector in (mean, radial)]
            gains = [_gain(map_, vector) for vector in vectors]
            if isinstance(norm, LayerNorm):
                passed = gains[0] < NULL[value.dtype]
            else:
                unit = float((n.square().mean(-1) - 1).abs().max())
                passed = unit < NEAR and gains[1] < NEAR
            if passed:
                streams.append(part.name)
                near.append((vectors[1], gains[1]))
                kept[part.name] = (vectors[1],)
                if isinstance(norm, LayerNorm):
                    exact.append((vectors[0], gains[0]))
                    kept[part.name] = tuple(vectors)
                break
    passing = [vector for name in kept if name not in streams for vector in kept[name]]
    if not kept:
        return Zeros()
    left = torch.stack([*(vector for vector, _ in (*exact, *near)), *passing], dim=-1)
    return Zeros(
        leave=complement(left),
        exact=map_.tokens * len(exact),
        near=map_.tokens * len(near),
        exact_gain=max((gain for _, gain in exact), default=0.0),
        near_gain=max((gain for _, gain in near), default=0.0),
        left=left,
        streams=tuple(streams),
        kept=kept,
    )


def constant_zeros(map_: Linear) -> Zeros:
    """Of a map that reads its input through LN: the constant vector of every token.

    Nothing where it is not lost, as with RMSNorm.
    """
    width = map_.inputs
    constant = torch.full((map_.tokens, width), width**-0.5).to(map_.like)
    gain = _gain(map_, constant, right=True)
    if gain >= NULL[map_.like.dtype]:
        return Zeros()
    right = constant[..., None]
    return Zeros(enter=complement(right), exact=map_.tokens, exact_gain=gain, right=right)


def complement(vectors: Tensor) -> Tensor:
    """Orthonormal bases of what is orthogonal to vectors, per token: (T, c, k) → (T, c, c − k)."""
    q: Tensor = torch.linalg.qr(vectors, mode="complete").Q
    return q[..., vectors.shape[-1] :].contiguous()


def _null_vectors(value: Tensor, norm: LayerNorm | RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """n, and 1/w and n/w as unit vectors, (T, d) each, from v = w ∘ n + b."""
    bias = getattr(norm, "bias", None)
    n: Tensor = (value if bias is None else value - bias) / norm.weight
    pair = ((1 / norm.weight).expand_as(value), n / norm.weight)
    mean, radial = (vector / vector.norm(dim=-1, keepdim=True) for vector in pair)
    return n, mean, radial


def _placed(vector: Tensor, place: slice, width: int) -> Tensor:
    whole = vector.new_zeros(len(vector), width)
    whole[:, place] = vector
    return whole


def _gain(map_: Linear, vectors: Tensor, *, right: bool = False) -> float:
    """Largest gain J gives a random sum of tokens' vectors, relative to a random direction's."""
    generator = torch.Generator().manual_seed(0)
    apply = map_.times if right else map_.transposed
    width = vectors.shape[1]
    signs = map_.random(1, 4, generator)
    chosen = vectors[..., None] * signs
    whole = map_.random(width, 4, generator)
    lost, kept = (apply(z).square().sum((0, 1)).sqrt() for z in (chosen, whole))
    lost, kept = lost / chosen.square().sum((0, 1)).sqrt(), kept / whole.square().sum((0, 1)).sqrt()
    return float(lost.max() / kept.mean().clamp_min(1e-300))
