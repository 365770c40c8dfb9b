"""Numbers of tokens, summed up: a mean whose interval is over sequences, and the tokens' spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.errors import DataError
from polyak.statistics.intervals import Interval, student

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Summary:
    """A number of every token.

    Attributes:
        mean: of the sequences' means, with a 95% Student interval over sequences; None where
            fewer than two sequences have the number.
        quantiles: 10%, 50% and 90% over tokens.
        missing: share of the tokens at which it is not defined, such as an angle with nothing.
    """

    mean: Interval | None
    quantiles: tuple[float, ...] | None
    missing: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_sequences(ids: Tensor) -> None:
    """See that there is an error to be had.

    Raises:
        DataError: fewer than two sequences.
    """
    if len(ids) < 2:
        raise DataError(
            "errors are over sequences, and there is one; give at least two (more tokens, or a "
            "smaller length)"
        )


def mean_of(samples: Sequence[float]) -> Interval:
    """The mean over sequences with its 95% Student interval."""
    return student(samples)


class Tally:
    """Collects numbers of tokens by name, pass by pass; NaN where a token has none."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Values (B, T)."""
        self._kept.setdefault(name, []).append(values.detach().double().cpu())

    def summaries(self) -> Mapping[str, Summary]:
        """By name, in the order they were added first."""
        return {name: summary(torch.cat(parts)) for name, parts in self._kept.items()}


def summary(values: Tensor) -> Summary:
    """Of one number of every token, (N, T)."""
    defined = torch.isfinite(values)
    means = [
        float(row[there].mean()) for row, there in zip(values, defined, strict=True) if there.any()
    ]
    tokens = values[defined]
    quantiles = None
    if len(tokens):
        at = torch.tensor(QUANTILES, dtype=torch.float64)
        # `quantile` takes no more than 2²⁴ numbers
        ordered = tokens.sort().values
        places = (at * (len(ordered) - 1)).round().long()
        quantiles = tuple(float(x) for x in ordered[places])
    missing = 1 - float(defined.double().mean())
    return Summary(mean_of(means) if len(means) > 1 else None, quantiles, missing)
