r"""The model's own convergence curve: its loss, were it to stop after any substep.

    L_s = mean over tokens of −log softmax(head(norm(x_s)))[target],   s = 0, …, S

(the logit lens, along a rule's substeps). L_S is the model's loss. A middle value says how far x_s
is in the *final* coordinates: it can be bad where x_s holds all it needs in others, for which
there is the affine lens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.analysis.dynamics.lens import Lens
from polyak.analysis.dynamics.summaries import check_sequences, mean_of
from polyak.analysis.dynamics.trajectory import Watched
from polyak.statistics.intervals import Interval


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses along depth, in nats a token, with 95% intervals over sequences."""

    labels: tuple[str, ...]
    loss: tuple[Interval, ...]
    """After each substep; the first is that of x₀."""
    change: tuple[Interval, ...]
    """What each substep changes, by pairs: one fewer."""
    lens: tuple[Interval, ...] | None
    """Through the affine lens."""
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def loss_curve(watched: Watched, ids: Tensor, *, lens: Lens | None = None) -> Curve:
    """The loss after every substep.

    Args:
        watched: the model.
        ids: (N, T+1) token ids, N ≥ 2.
        lens: fitted on other text, for a second curve.

    Raises:
        ConfigError: see `Watched`.
        DataError: one sequence, or tokens the model does not know.
    """
    check_sequences(ids)
    plain: list[Tensor] = []
    through: list[Tensor] = []
    for some, made in watched.passes(ids):
        targets = some[:, 1:]
        plain.append(torch.stack([_losses(watched, x, targets) for x in made.xs], dim=1))
        if lens is not None:
            seen = [_losses(watched, lens(s, x), targets) for s, x in enumerate(made.xs)]
            through.append(torch.stack(seen, dim=1))
    losses = torch.cat(plain)
    return Curve(
        labels=tuple(watched.labels),
        loss=_columns(losses),
        change=_columns(losses.diff(dim=1)),
        lens=_columns(torch.cat(through)) if through else None,
        tokens=ids[:, 1:].numel(),
    )


def _losses(watched: Watched, x: Tensor, targets: Tensor) -> Tensor:
    """Every sequence's mean loss, (B,)."""
    logits = watched.logits(x)
    return F.cross_entropy(logits.mT, targets, reduction="none").double().mean(1).cpu()


def _columns(values: Tensor) -> tuple[Interval, ...]:
    return tuple(mean_of(column.tolist()) for column in values.unbind(1))
