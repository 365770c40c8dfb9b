r"""The path of x through depth, and what streams keep of themselves, token by token.

With u_s = x_{s+1} − x_s:

- `size` ‖x_s‖/√d, `update` ‖u_s‖/√d, `relative` ‖u_s‖/‖x_s‖;
- `turn` cos(u_s, u_{s−1}); `damping` 1 − ⟨u_s, u_{s−1}⟩/‖u_{s−1}‖², that of increments: a filter
  v ← av + …, x ← x + v shows 1 − a where what is new is orthogonal to what was there;
- `length` Σ‖u_s‖, `distance` ‖x_S − x₀‖, and `detour`, length over distance, at least 1.

Of every stream v of the substep's rule, v′ after it:

- `size` ‖v′‖/√n of v's n numbers, `retention` cos(v′, v), `damping` 1 − ⟨v′, v⟩/‖v‖²
  (−⟨Δv, v⟩/‖v‖²);
- `gain` ‖∂v′/∂v z‖/‖z‖ for one random z a token with the oracle's answers held fixed: β where there
  is no norm, and about β·g/σ_w behind one, v′ = LN(w) = g ∘ (w − mean w)/σ_w.

β alone is no damping behind a norm: β∂L/∂β + γ∂L/∂γ = 0 up to eps, so that the loss tells β/γ only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from polyak.analysis.dynamics.summaries import Summary, Tally, check_sequences
from polyak.analysis.dynamics.trajectory import Substep, Trajectory, Watched


@dataclass(frozen=True, kw_only=True)
class Motion:
    """Numbers along depth, each with its interval over sequences and its spread over tokens.

    Attributes:
        labels: of x₀, …, x_S.
        numbers: by `POINT/NAME`, `POINT/STREAM/NAME` and `whole/NAME`; POINT counts from 0, and
            an update is filed under the point it leads to.
        tokens: how many were looked at.
    """

    labels: tuple[str, ...]
    numbers: dict[str, Summary]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        numbers = {name: one.to_dict() for name, one in self.numbers.items()}
        return {"labels": list(self.labels), "numbers": numbers, "tokens": self.tokens}


def motion(watched: Watched, ids: Tensor, *, seed: int = 0) -> Motion:
    """The path of x, and what the rule's streams keep.

    Args:
        watched: the model; a plain Hugging Face model has no streams.
        ids: (N, T+1) token ids, N ≥ 2.
        seed: of the random vectors for `gain`.

    Raises:
        ConfigError: see `Watched`.
        DataError: one sequence, or tokens the model does not know.
    """
    check_sequences(ids)
    tally, generator = Tally(), torch.Generator().manual_seed(seed)
    for _, made in watched.passes(ids):
        _walk(tally, made)
        for place, substep in enumerate(made.substeps, start=1):
            _streams(tally, place, substep, generator)
    return Motion(
        labels=tuple(watched.labels),
        numbers=dict(tally.summaries()),
        tokens=ids[:, 1:].numel(),
    )


def _walk(tally: Tally, made: Trajectory) -> None:
    updates, root = made.updates, made.xs[0].shape[-1] ** 0.5
    for place, x in enumerate(made.xs):
        tally.add(f"{place}/size", x.norm(dim=-1) / root)
        if place:
            update = updates[place - 1]
            length = update.norm(dim=-1)
            tally.add(f"{place}/update", length / root)
            tally.add(f"{place}/relative", length / made.xs[place - 1].norm(dim=-1))
        if place > 1:
            tally.add(f"{place}/turn", cosine(update, updates[place - 2]))
            tally.add(f"{place}/damping", 1 - kept(update, updates[place - 2]))
    length = torch.stack([update.norm(dim=-1) for update in updates]).sum(0)
    distance = (made.xs[-1] - made.xs[0]).norm(dim=-1)
    tally.add("whole/length", length / root)
    tally.add("whole/distance", distance / root)
    tally.add("whole/detour", length / distance)


def _streams(tally: Tally, place: int, substep: Substep, generator: torch.Generator) -> None:
    for stream in substep.rule.streams:
        before, after = (getattr(s, stream.name) for s in (substep.state, substep.after))
        old, new = before.flatten(2), after.flatten(2)
        at = f"{place}/{stream.name}"
        tally.add(f"{at}/size", new.norm(dim=-1) / new.shape[-1] ** 0.5)
        tally.add(f"{at}/retention", cosine(new, old))
        tally.add(f"{at}/damping", 1 - kept(new, old))
        if before.dim() == 3:  # a matrix moves among symmetric ones only
            tally.add(f"{at}/gain", gain(substep, stream.name, generator))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of the angle between vectors (…, n); NaN where one of them is 0."""
    lengths: Tensor = one.norm(dim=-1) * other.norm(dim=-1)
    return (one * other).sum(-1) / lengths


def kept(after: Tensor, before: Tensor) -> Tensor:
    """⟨after, before⟩/‖before‖²: how much of `before` is in `after`; NaN where it is 0."""
    return (after * before).sum(-1) / before.square().sum(-1)


def gain(substep: Substep, name: str, generator: torch.Generator) -> Tensor:
    """‖∂v′/∂v z‖/‖z‖ of each token, (B, T), with the oracle's answers held fixed."""
    start = getattr(substep.state, name)
    drawn = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)

    def moved(value: Tensor) -> Tensor:
        answers = iter(substep.values)
        state = substep.state.replace(**{name: value})
        _, after = type(substep.rule).step(substep.rule, substep.x, state, lambda _: next(answers))
        found: Tensor = getattr(after, name)
        return found

    with torch.no_grad():
        change = jvp(moved, (start,), (drawn,))[1]
    grown: Tensor = change.norm(dim=-1) / drawn.norm(dim=-1)
    return grown
