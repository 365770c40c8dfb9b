"""Measurements of many models, kept one file each, so that a study goes on where it was stopped.

A part is one measurement of one model. Its file holds what it was asked for (the key) beside what
it found, and appears under its name only when it is whole. A study that is started again finds
the parts that are there; one that asks for something else is refused, with the difference shown.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyak import formats
from polyak.errors import RunError, plain, shown_value
from polyak.files import make_folder, sha256_of_json, write_json
from polyak.reading import ANY_OBJECT, Check, fields, number, optional, text

Tick = Callable[[float], None]
"""Called with the share of a part that is done, from 0 to 1."""
Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One measurement of one model.

    Attributes:
        subject: the model's name.
        kind: what is measured: the file's name.
        key: all that the result depends on, as JSON has it.
        work: expected seconds.
        measure: does it.
        defaults: of what is in `key`: a file that an older version wrote may lack some.
        fits: what it found, where that is read again.
    """

    subject: str
    kind: str
    key: Mapping[str, Any]
    work: float
    measure: Callable[[Tick], Found]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fits: Check = ANY_OBJECT

    def file(self, folder: Path) -> Path:
        """Where its result is kept."""
        slug = re.sub(r"[^A-Za-z0-9_.=-]+", "_", self.subject).strip("_.") or "model"
        return folder / "parts" / slug / f"{self.kind}.json"


def done(part: Part, folder: Path) -> Found | None:
    """What a part found, if it was measured before.

    Raises:
        RunError: the file is of a part that was asked for something else; up to four differences
            are named.
    """
    file = part.file(folder)
    if not file.exists():
        return None
    content = kept(file, part.fits)
    wanted = json.loads(json.dumps(part.key))
    there = over(_only(part.defaults, wanted), content["key"])
    if wanted != there:
        names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
        shown = "; ".join(
            f"{plain(n[:80])}: {shown_value(there.get(n))} there, {shown_value(wanted.get(n))} now"
            for n in names[:4]
        )
        raise RunError(f"{file} was measured otherwise ({shown}); choose another --out")
    found: Found = content["found"]
    return found


_KEPT = {
    "key": ANY_OBJECT,
    "seconds": optional(number),
    "sha256": optional(text(64)),
}


def kept(file: Path, fits: Check = ANY_OBJECT) -> dict[str, Any]:
    """The content of a part's file, as it was written; `fits` says what it must have found.

    Raises:
        RunError: it is no part of a study, or was changed since.
    """
    again = "remove it, and it is measured again"
    try:
        content = fields(formats.read(file, "part"), str(file), {**_KEPT, "found": fits})
    except RunError as problem:
        raise RunError(f"{problem}; {again}") from None
    check_unchanged(content["found"], content.get("sha256"), str(file), again)
    return content


def check_unchanged(found: Any, sha256: str | None, where: str, fix: str) -> None:
    """See that what was measured is what was written; older files have no hash.

    Raises:
        RunError: it was changed.
    """
    if sha256 is not None and sha256_of_json(found) != sha256:
        raise RunError(f"{where} was changed since it was measured; {fix}")


def _only(defaults: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of what is asked for today."""
    made = {name: value for name, value in defaults.items() if name in wanted}
    for name, value in made.items():
        if isinstance(value, Mapping):
            made[name] = _only(value, wanted[name])
    return dict(json.loads(json.dumps(made)))


def over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given values over the defaults, also inside the values that are mappings."""
    made = {**defaults, **given}
    for name, value in given.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            made[name] = over(defaults[name], value)
    return made


def measure_all(
    parts: Sequence[Part],
    folder: Path,
    *,
    after_each: Callable[[Part, Found], None],
    progress: Callable[[float, str], None] | None = None,
) -> None:
    """Measure the parts that are not there yet, in order.

    Args:
        parts: all parts of the study.
        folder: the study's.
        after_each: called with every part and what it found, those found before first.
        progress: called with the share of all expected work that is done, and what is under way.

    Raises:
        RunError: a part was measured otherwise before, or its file cannot be written.
    """
    missing = []
    for part in parts:
        found = done(part, folder)
        if found is None:
            missing.append(part)
        else:
            after_each(part, found)
    total, finished = sum(part.work for part in missing) or 1.0, 0.0
    for part in missing:

        def tick(share: float, part: Part = part, finished: float = finished) -> None:
            if progress is not None:
                progress((finished + share * part.work) / total, f"{part.subject}: {part.kind}")

        tick(0.0)
        began = time.perf_counter()
        found = part.measure(tick)
        content: Found = {
            "format": formats.current("part"),
            "key": part.key,
            "seconds": time.perf_counter() - began,
            "found": found,
            "sha256": sha256_of_json(found),
        }
        make_folder(part.file(folder).parent)
        write_json(part.file(folder), content)
        finished += part.work
        after_each(part, found)


def expected(parts: Sequence[Part], folder: Path) -> tuple[int, int, float]:
    """(parts in all, parts that are there, seconds expected for the rest).

    Raises:
        RunError: a part was measured otherwise before.
    """
    missing = [part for part in parts if done(part, folder) is None]
    return len(parts), len(parts) - len(missing), sum(part.work for part in missing)
