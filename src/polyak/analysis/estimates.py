"""Numbers with what is known of their errors, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with what is known of its error."""

    value: float | None
    low: float | None = None
    high: float | None = None
    residual: float | None = None
    """Relative: how far the singular vectors miss their equations."""
    kind: Literal["value", "lower bound", "upper bound", "interval"] = "value"


def persistence(logs: Sequence[Estimate]) -> Estimate:
    """Σ_l log σ_min over blocks, from `log_sigma_min` of each; a bound where one is a bound."""
    values = [log.value for log in logs]
    if any(value is None for value in values):
        return Estimate(value=None, kind="upper bound")
    total = math.fsum(value for value in values if value is not None)
    if any(log.kind != "value" for log in logs):
        return Estimate(value=total, high=total, kind="upper bound")
    low, high = (math.fsum(known(getattr(log, end)) for log in logs) for end in ("low", "high"))
    return Estimate(value=total, low=low, high=high)


def exact(value: Tensor) -> Estimate:
    """A value of a dense decomposition."""
    number = float(value)
    return Estimate(value=number, low=number, high=number, residual=0.0)


def smallest(values: Tensor) -> Estimate:
    """σ_min of a dense decomposition: below the rounding of σ_max it is a bound."""
    rounding = float(values[0]) * len(values) * torch.finfo(torch.float64).eps
    if float(values[-1]) > rounding:
        return exact(values[-1])
    return Estimate(value=rounding, high=rounding, kind="upper bound")


def relative(residual: float, value: float) -> float:
    """A residual relative to a positive value."""
    return residual / value if value > 0 else 0.0


def known(value: float | None) -> float:
    """An end of an interval that there is."""
    assert value is not None, "a value has an interval"
    return value


def ratio(top: Estimate, bottom: Estimate) -> Estimate:
    """κ = σ_max/σ_min; from below where one of them is a bound."""
    if not top.value or not bottom.value:
        return Estimate(value=None, kind="lower bound")
    value = top.value / bottom.value
    if top.kind != "value" or bottom.kind != "value":
        return Estimate(value=value, low=value, kind="lower bound")
    low = known(top.low) / known(bottom.high)
    high = known(top.high) / known(bottom.low)
    return Estimate(value=value, low=low, high=high)


def stable_rank(frobenius: Estimate, top: Estimate) -> Estimate:
    """‖J‖_F²/σ_max²; from above where σ_max is a bound from below."""
    if not top.value or not frobenius.value:
        return Estimate(value=None, kind="upper bound")
    value = (frobenius.value / top.value) ** 2
    high = (known(frobenius.high) / top.value) ** 2
    if top.kind != "value":
        return Estimate(value=value, high=high, kind="upper bound")
    low = (known(frobenius.low) / known(top.high)) ** 2
    return Estimate(value=value, low=low, high=high, kind=frobenius.kind)


def log(bottom: Estimate) -> Estimate:
    """The logarithm; of a bound, a bound."""
    if not bottom.value:
        return Estimate(value=None, kind="upper bound")
    value = math.log(bottom.value)
    if bottom.kind != "value":
        return Estimate(value=value, high=value, kind="upper bound")
    low, high = math.log(known(bottom.low)), math.log(known(bottom.high))
    return Estimate(value=value, low=low, high=high)
