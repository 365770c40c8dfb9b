"""Formats of what polyak keeps on disk, and how what an older polyak wrote is brought up to date.

Every kept file says its format, a whole number that grows when the file's meaning changes; a
field that is only added needs no new format, since what it lacks has today's default. A file
of an older format is brought up to date here when it is read, step by step, and nowhere else;
one of a newer format is refused. Whoever changes a format adds one function to `UPGRADES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.errors import PolyakError, RunError
from polyak.files import read_json

Content = dict[str, Any]
Upgrade = Callable[[Content], Content]
"""From the content of one format to that of the next; `format` itself is set by the caller."""


def _first_split(part: str, field: str) -> Upgrade:
    """Files that do not say their version of the split (`polyak.data.split`) are of the first."""

    def upgrade(content: Content) -> Content:
        found = content.get(part)
        return {**content, part: {field: 1, **found}} if isinstance(found, Mapping) else content

    return upgrade


UPGRADES: dict[str, Sequence[Upgrade]] = {
    "run": (_first_split("config", "split"),),  # run.json; it speaks for the whole run folder
    "checkpoint": (),  # checkpoints/step-NNNNNN/manifest.json
    "prepared": (_first_split("split", "version"),),  # manifest.json of a prepared corpus
    "tokenizer": (),  # polyak_tokenizer.json
    "part": (),  # one measurement of a study, or of `polyak forgetting`
    # results.json, by its `kind`
    "bench": (),
    "comparison": (_first_split("corpus", "split"),),
    "downstream": (),
    "dynamics": (),
    "evaluation": (),
    "factorial": (),
    "forgetting": (),
    "generate": (),
    "landscape": (),
    "prepare bench": (),
    "runs": (),
    "sharpness": (),
    "spectrum": (),
}
"""What brings a kind's format 1 to 2, 2 to 3 and so on; a kind's format is 1 + their number."""

WHAT = {
    "run": "a run's",
    "checkpoint": "a checkpoint's",
    "prepared": "a manifest of a prepared corpus",
    "tokenizer": "a tokenizer's that polyak wrote",
    "part": "a part of a study; remove it, and it is measured again",
}
"""What a file of a kind is, where it is said that another is not; the rest are results."""

WITHOUT = ("bench", "generate", "part", "prepare bench")
"""Kinds that release 0.1.0 wrote without a format; theirs is 1."""


def current(kind: str) -> int:
    """The format that is written today."""
    return 1 + len(UPGRADES[kind])


def read(path: Path, kind: str, *, error: type[PolyakError] = RunError) -> Content:
    """The content of a kept file, as today's polyak would have written it.

    Raises:
        PolyakError: of type `error`, one line: it cannot be read, it is no JSON object, it has no
            format, or one that is newer than this polyak.
    """
    return up_to_date(read_json(path, error=error), kind, path, error=error)


def read_results(path: Path, *kinds: str) -> Content:
    """A `results.json` of one of the kinds (of any, where none is given), as of today.

    Raises:
        RunError: see `read`; or it is of another kind, which is named.
    """
    content = read_json(path)
    kind = content.get("kind") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in (kinds or UPGRADES):
        wanted = f" of {' or '.join(kinds)}" if kinds else ""
        raise RunError(f"{path} holds no results{wanted}: its kind is {kind!r}")
    return up_to_date(content, kind, path)


def up_to_date(
    content: Any, kind: str, path: Path, *, error: type[PolyakError] = RunError
) -> Content:
    """Content of a file as today's polyak would have written it; see `read`."""
    what = WHAT.get(kind, "the results of polyak")
    if not isinstance(content, Mapping):
        raise error(f"{path} is not {what}")
    there = content.get("format", 1 if kind in WITHOUT else None)
    if isinstance(there, bool) or not isinstance(there, int) or there < 1:
        raise error(f"{path} is not {what}: format={there!r}"[:200])
    if there > current(kind):
        raise error(
            f"{path} has format {there}, this polyak reads up to {current(kind)}; upgrade polyak"
        )
    made = dict(content)
    for step in UPGRADES[kind][there - 1 :]:
        made = step(made)
    return {**made, "format": current(kind)}
