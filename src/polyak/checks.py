"""Checks that configuration fields share; each failure is one line with field, value and fix."""

from __future__ import annotations

import math

from polyak.errors import ConfigError, shown_value


def is_whole(value: object) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number; true and false are none."""
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond a float's range
        return False


def check_whole(
    name: str,
    value: object,
    least: int = 1,
    *,
    optional: bool = False,
    most: int | None = None,
) -> None:
    """See that a field is a whole number from `least` to `most`, or None where that is allowed.

    Raises:
        ConfigError: it is not.
    """
    if optional and value is None:
        return
    if not is_whole(value) or value < least:  # type: ignore[operator]
        other = ", or none" if optional else ""
        raise ConfigError(
            f"{name}={shown_value(value)} must be a whole number of at least {least}{other}"
        )
    if most is not None and value > most:  # type: ignore[operator]
        raise ConfigError(f"{name}={shown_value(value)} must be at most {most:,}")


def check_number(
    name: str, value: object, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> None:
    """See that a field is a finite number from `low` to `high`; not `low` itself with `above`.

    Raises:
        ConfigError: it is not.
    """
    if is_number(value):
        number = float(value)  # type: ignore[arg-type]
        if low <= number <= high and not (above and number == low):
            return
    start = f"above {low:g}" if above else f"of at least {low:g}" if high == math.inf else None
    bound = f"from {low:g} to {high:g}" if start is None else start
    if above and high != math.inf:
        bound = f"{start}, up to {high:g}"
    raise ConfigError(f"{name}={shown_value(value)} must be a number {bound}")
