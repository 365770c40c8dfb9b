"""What a file from elsewhere must look like: closed types, bounds, names that stay in the folder.

A reader says in a table what it takes, and gets one line that names file and field for whatever
else is there. Nothing is allocated, listed or looped over before that.

>>> fields({"tokens": -1}, "manifest.json", {"tokens": whole()})
Traceback (most recent call last):
polyak.errors.RunError: manifest.json: tokens must be a whole number from 0 to 2^53, found -1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyak.errors import PolyakError, RunError, shown_value

Check = Callable[[Any], None]
"""Raises `UnfitError` where a value does not fit."""

MOST = 2**53
"""The largest whole number that every JSON has exactly."""


class UnfitError(ValueError):
    """A value that does not fit: what it must be, what it is, and where it stands."""

    def __init__(self, must: str, found: Any) -> None:
        super().__init__(must)
        self.must, self.found, self.path = must, found, ""

    def inside(self, step: str) -> UnfitError:
        """The same, seen from the value around it."""
        self.path = f"{step}.{self.path}" if self.path else step
        return self


def fields(
    value: Any, where: str, wanted: Mapping[str, Check], *, error: type[PolyakError] = RunError
) -> dict[str, Any]:
    """An object of JSON that has the fields of a table, each as it must be; others may be there.

    Raises:
        PolyakError: of type `error`: `where`, the field, what it must be and what is there.
    """
    try:
        table(wanted)(value)
    except UnfitError as problem:
        field = f"{problem.path} " if problem.path else ""
        raise error(
            f"{where}: {field}must be {problem.must}, found {shown_value(problem.found)}"
        ) from None
    checked: dict[str, Any] = value
    return checked


def table(wanted: Mapping[str, Check]) -> Check:
    """An object with these fields at least."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise UnfitError("an object", value)
        for name, inner in wanted.items():
            if name not in value and not _is_optional(inner):
                raise UnfitError("there", None).inside(name)
            with_path(inner, value.get(name), name)

    return check


def with_path(check: Check, value: Any, step: str) -> None:
    """Check a value that stands inside another, at `step`."""
    try:
        check(value)
    except UnfitError as problem:
        raise problem.inside(step) from None


def optional(check: Check) -> Check:
    """As `check`, or null, or not there."""

    def maybe(value: Any) -> None:
        if value is not None:
            check(value)

    maybe.optional = True  # type: ignore[attr-defined]
    return maybe


def _is_optional(check: Check) -> bool:
    return getattr(check, "optional", False)


def whole(low: int = 0, high: int = MOST) -> Check:
    """A whole number within bounds; true and false are none."""
    top = "2^53" if high == MOST else f"{high:,}"

    def check(value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UnfitError(f"a whole number from {low:,} to {top}", value)

    return check


def number(value: Any) -> None:
    """A finite number that a float can hold."""
    try:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and math.isfinite(value)
    except OverflowError:
        fits = False
    if not fits:
        raise UnfitError("a number", value)


def between(low: float, high: float) -> Check:
    """A number within bounds."""

    def check(value: Any) -> None:
        number(value)
        if not low <= value <= high:
            raise UnfitError(f"a number from {low:g} to {high:g}", value)

    return check


def text(longest: int = 10_000) -> Check:
    """Text of at most so many characters."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise UnfitError(f"text of at most {longest:,} characters", value)

    return check


def one_of(*choices: Any) -> Check:
    """One of a closed list."""

    def check(value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise UnfitError(f"one of {', '.join(map(repr, choices))}", value)

    return check


def anything(value: Any) -> None:
    """Any value, which is passed on without a look."""


def list_of(check: Check, most: int = 1_000_000, least: int = 0) -> Check:
    """A list of at most so many of a kind, and at least so many."""
    bounds = {0: f"at most {most:,}", most: f"{most:,}"}
    size = bounds.get(least, f"{least:,} to {most:,}")

    def checks(value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise UnfitError(f"a list of {size}", value)
        for place, inner in enumerate(value):
            with_path(check, inner, str(place))

    return checks


def mapping_of(check: Check, most: int = 1_000_000) -> Check:
    """An object of at most so many values of a kind, under any names."""

    def checks(value: Any) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise UnfitError(f"an object of at most {most:,} fields", value)
        for name, inner in value.items():
            with_path(check, inner, shown_value(name).strip("'"))

    return checks


ANY_OBJECT = mapping_of(anything)
"""An object, whatever is inside it."""


def named(check_of: Callable[[str], Check | None]) -> Check:
    """An object of which every field is known by its name; none has to be there."""

    def checks(value: Any) -> None:
        if not isinstance(value, dict):
            raise UnfitError("an object", value)
        for name, inner in value.items():
            with_path(check_of(name) or _unknown, inner, shown_value(name).strip("'"))

    return checks


def _unknown(value: Any) -> None:
    raise UnfitError("left out: no field has this name", value)


def only(wanted: Mapping[str, Check], may: Mapping[str, Check] | None = None) -> Check:
    """An object with all of these fields, those that it may have beside them, and no other."""
    known = named({**wanted, **(may or {})}.get)

    def checks(value: Any) -> None:
        known(value)
        for name in wanted:
            if name not in value:
                raise UnfitError("there", None).inside(name)

    return checks


def file_name(value: Any) -> None:
    """The plain name of a file in the same folder: no folder before it, nothing that leads out."""
    plain = isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()
    if not plain or value in (".", "..") or set(value) & set("/\\:"):
        raise UnfitError("the name of a file in this folder", value)


def inside(folder: Path, name: str, *, error: type[PolyakError] = RunError) -> Path:
    """The path of a file in a folder, once nothing leads out of that, links included.

    Raises:
        PolyakError: of type `error`: it leads out.
    """
    path = folder / name
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL
        within = False
    if not within or path.is_symlink():
        raise error(f"{path} leads out of its folder, or is a link; put the file itself there")
    return path
