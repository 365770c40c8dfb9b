"""What kept Jacobian spectra look like: names of sequence, block and part, and a closed table."""

from __future__ import annotations

import re
from typing import Any

from polyak.analysis.spectrum_config import SpectrumConfig
from polyak.reading import (
    Check,
    between,
    list_of,
    named,
    number,
    one_of,
    only,
    optional,
    text,
    whole,
    with_path,
)

_KEY = re.compile(r"(?P<sequence>0|[1-9]\d{0,8})/(0|[1-9]\d{0,3}|product)/(?P<part>[abc])")
_KINDS = one_of("value", "lower bound", "upper bound", "interval")
_SIZES = between(0, 1e300)
"""Of singular values, their norms and ratios."""
_LOGS = between(-1000, 1000)
"""Beyond the logarithm of every float."""


def fits(config: SpectrumConfig) -> Check:
    """A run's spectra, as `spectrum_of` gives them when asked for this; some may be missing."""
    wanted = _spectrum(len(config.wanted))

    def spectrum_named(key: str) -> Check | None:
        found = _KEY.fullmatch(key)
        known = found and int(found["sequence"]) < config.sequences
        return wanted if known and found and found["part"] in config.chosen else None

    return named(spectrum_named)


def estimate(of: Check = _SIZES) -> Check:
    """An `Estimate`: a value has both ends of its interval, a bound need not."""
    ends = dict.fromkeys(("value", "low", "high", "residual"), optional(of))
    wanted = only({**ends, "residual": optional(_SIZES), "kind": _KINDS})

    def check(value: Any) -> None:
        wanted(value)
        if value["kind"] == "value" and value.get("value") is not None:
            for end in ("low", "high"):
                with_path(number, value.get(end), end)

    return check


LOG = estimate(_LOGS)
"""Of a σ_min, or of a sum of those."""


def _spectrum(quantiles: int) -> Check:
    size = list_of(whole(), 2, 2)
    values = ("sigma_max", "sigma_min", "restricted_max", "kappa", "frobenius", "stable_rank")
    each = only({"q": between(0, 1), **dict.fromkeys(("value", "low", "high"), optional(_SIZES))})
    return only(
        {
            "name": text(200),
            "method": one_of("dense", "pieces", "matrix-free"),
            **dict.fromkeys(("shape", "restricted"), size),
            **dict.fromkeys(("exact_zeros", "near_zeros"), whole()),
            **dict.fromkeys(("exact_gain", "near_gain", "seconds"), optional(_SIZES)),
            "streams": list_of(text(200), 100),
            **dict.fromkeys(values, estimate()),
            "log_sigma_min": LOG,
            "quantiles": list_of(each, quantiles),
            "published": list_of(_SIZES, 100),
        }
    )
