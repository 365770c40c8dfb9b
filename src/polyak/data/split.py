"""Which side of the split a document is on.

Two versions. In the first, a document's side depends on the hash of its name (of files) or its
content (of records), so that equal files can be on both sides, and so can parts of texts. In the
second, equal documents are always on one side, and no held-out document has much text in common
with the training side: see `Corpus.splitter`. Runs keep the version they were made with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from polyak.checks import check_number
from polyak.data.documents import Document, LongText, Text, parts_of
from polyak.errors import ConfigError, DataError

SPLIT = 2
"""The version that new runs and corpora get."""
NEAR = 0.02
"""Share of a held-out document's windows that may occur on the training side."""
SIDES = ("train", "validation")

By = Literal["name", "content", "tail", "own"]
Apart = Literal["train", "nowhere"]

# Part of every document's hash. Changing it changes every split, so it never changes.
_SALT = b"polyak split 1:"


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """Which side of the split a document is on: a fixed function of the document alone.

    A document is held out when the SHA-256 of its name (or content), read as a number in [0, 1),
    is below `fraction`; so adding a document never moves another. Where that leaves a side of
    two or more documents empty, the document with the lowest (highest) number is its only one.
    A corpus of a single document is cut in two: its tail, back to a line's start, is held out.
    A corpus with a split of its own keeps it. Empty documents are on neither side.

    Attributes:
        fraction: share of the documents that is held out.
        by: what decides.
        version: of the split.
        only_validation: the document that alone is held out, by name.
        only_train: the document that alone is not.
        only: its number in [0, 1), which its duplicates have, too (version 2).
        sides: the sides there are.
        apart: numbers of the documents that would be held out but for their windows.
        apart_to: where those go.
        found: what is said of them in the manifest.
    """

    fraction: float
    by: By
    version: int = 1
    only_validation: str | None = None
    only_train: str | None = None
    only: float | None = None
    sides: tuple[str, ...] = SIDES
    apart: frozenset[float] = frozenset()
    apart_to: Apart = "train"
    found: dict[str, Any] = field(default_factory=dict)

    def divide(self, document: Document) -> tuple[Text | None, ...]:
        """The text that goes to each side; None where a side gets nothing."""
        text = document.text
        if not text:
            return (None,) * len(self.sides)
        if self.by == "own":
            return tuple(text if side == document.side else None for side in self.sides)
        if self.by == "tail":
            if isinstance(text, LongText):
                return text.cut(_long_tail_start(text, self.fraction))
            cut = _tail_start(text, self.fraction)
            return text[:cut], text[cut:]
        number = score(document, self.by)
        if not self._held_out(document, number):
            return text, None
        if number in self.apart:
            return (text, None) if self.apart_to == "train" else (None, None)
        return None, text

    def _held_out(self, document: Document, number: float) -> bool:
        if self.only_validation is not None:
            same = document.name == self.only_validation
            return same if self.only is None else number == self.only
        if self.only_train is not None:
            same = document.name == self.only_train
            return not (same if self.only is None else number == self.only)
        return number < self.fraction

    def describe(self) -> dict[str, object]:
        """What the manifest says about the split."""
        if self.by == "own":
            return {"by": "own", "rule": "the corpus's own split"}
        if self.by == "tail":
            rule = "the corpus is one document; its tail is held out"
        elif self.only_validation is not None:
            rule = f"by document; only {self.only_validation!r} is held out"
        elif self.only_train is not None:
            rule = f"by document; all but {self.only_train!r} are held out"
        else:
            rule = f"by document; held out where the hash of its {self.by} is below the fraction"
        described: dict[str, object] = {"fraction": self.fraction, "by": self.by, "rule": rule}
        if self.version > 1:
            described |= {"version": self.version, "near_duplicates": self.found or None}
        return described


def said(split: Mapping[str, Any]) -> str | None:
    """What a manifest's split says of text on both sides, in a sentence; None for nothing."""
    if int(split.get("version", 1)) < 2:
        return None if split.get("by") == "own" else "text on both sides was not looked for"
    found = split.get("near_duplicates")
    if not found:
        return None
    limit = "any" if not found["threshold"] else f"more than {found['threshold']:.3g} of their"
    if not found["documents"]:
        return f"no held-out document shares {limit} {found['window_bytes']}-byte windows"
    some = f"{found['documents']} document" + ("s" if found["documents"] != 1 else "")
    first = ", ".join(found["first"]) + (", …" if found["documents"] > len(found["first"]) else "")
    return (
        f"{some} ({found['bytes']:,} bytes) that share {limit} {found['window_bytes']}-byte "
        f"windows with training are {found['now']}: {first}"
    )


def decide(
    documents: Iterable[Document], name: str, fraction: float, by: By, version: int
) -> Splitter:
    """The split by hashes alone; reads until both sides are known not to be empty.

    Raises:
        DataError: the corpus holds no text, a single character, or copies of one document.
    """
    count, longest = 0, 0
    lowest, highest = (2.0, ""), (-1.0, "")
    for document in documents:
        if not document.text:
            continue
        short = isinstance(document.text, str) and len(document.text) < 2
        count, longest = count + 1, max(longest, 1 if short else 2)
        scored = (score(document, by), document.name)
        lowest, highest = min(lowest, scored), max(highest, scored)
        if lowest[0] < fraction <= highest[0]:
            return Splitter(fraction=fraction, by=by, version=version)
    if count == 0:
        raise DataError(f"corpus {name!r} is empty: it holds no document with any text")
    if count == 1:
        if longest < 2:
            raise DataError(
                f"corpus {name!r} is a single character, which cannot be split into "
                "training and validation text; give it more text"
            )
        return Splitter(fraction=fraction, by="tail", version=version)
    if version > 1 and lowest[0] == highest[0]:
        raise DataError(
            f"corpus {name!r} holds {count} copies of one document, so that nothing can be held "
            "out; give it other text, or that document alone"
        )
    only = {"fraction": fraction, "by": by, "version": version}
    if lowest[0] >= fraction:
        number = lowest[0] if version > 1 else None
        return Splitter(**only, only_validation=lowest[1], only=number)  # type: ignore[arg-type]
    number = highest[0] if version > 1 else None
    return Splitter(**only, only_train=highest[1], only=number)  # type: ignore[arg-type]


def without_shared(
    documents: Iterable[Document], splitter: Splitter, name: str, near: float, to: Apart
) -> Splitter:
    """The split in which no held-out document shares more than `near` of its windows.

    Held-out documents of which a larger share of windows (`polyak.data.windows`) occurs on the
    training side are not held out. With `to="train"` they are trained on, which is repeated until
    none is left, so that with `near=0` no window is on both sides. With `to="nowhere"` they are
    left out, so that adding a document never moves another from one side to the other. Where
    that would leave nothing to validate on, all stay, with a warning.
    """
    from polyak.data.windows import WINDOW, Shared  # and numpy, which --help does without

    apart: set[float] = set()
    held: dict[float, tuple[str, int]] = {}  # one of the copies of a document stands for all
    windows = Shared()
    for document in _on(documents, splitter, 1):
        number = score(document, splitter.by)
        if number not in held:
            held[number] = (document.name, sum(len(p.encode()) for p in parts_of(document.text)))
            windows.keep(document.text)
    for document in _on(documents, splitter, 0):
        windows.meet(document.text)
    while True:
        shares = dict(zip(held, windows.shares(), strict=True))
        new = {number for number, share in shares.items() if share > near} - apart
        apart |= new
        if to == "nowhere" or not new:
            break
        for document in _on(documents, splitter, 1):
            if score(document, splitter.by) in new:
                windows.meet(document.text)
    now = "on the training side" if to == "train" else "left out"
    if len(apart) == len(held):
        now = "held out all the same, as there are no others"
        warnings.warn(
            f"corpus {name!r}: all {len(held)} held-out documents have more than {near:g} of their "
            f"{WINDOW}-byte windows in common with the training side, so losses will be too low; "
            "give it more text",
            stacklevel=2,
        )
    first = [held[number][0] for number in sorted(apart)[:3]]
    found = {
        "window_bytes": WINDOW,
        "threshold": near,
        "exact": windows.exact,
        "documents": len(apart),
        "bytes": sum(held[number][1] for number in apart),
        "held_out_documents": len(held) - len(apart) * (len(apart) < len(held)),
        "now": now,
        "first": first,
    }
    return Splitter(
        fraction=splitter.fraction,
        by=splitter.by,
        version=splitter.version,
        only_validation=splitter.only_validation,
        only_train=splitter.only_train,
        only=splitter.only,
        apart=frozenset(apart) if len(apart) < len(held) else frozenset(),
        apart_to=to,
        found=found,
    )


def _on(documents: Iterable[Document], splitter: Splitter, side: int) -> Iterator[Document]:
    return (document for document in documents if splitter.divide(document)[side] is not None)


def check_fraction(fraction: float) -> None:
    """Raise `ConfigError` unless 0 < fraction < 1."""
    if not 0.0 < fraction < 1.0:
        raise ConfigError(
            f"validation_fraction={fraction!r} must lie strictly between 0 and 1, such as 0.05"
        )


def check_split(version: int, near: float) -> None:
    """Raise `ConfigError` unless there is such a version of the split, and 0 ≤ near ≤ 1."""
    if version not in range(1, SPLIT + 1) or isinstance(version, bool):
        raise ConfigError(f"split={version!r} must be one of the versions 1 to {SPLIT}")
    check_number("near_duplicates", near, 0, 1)


def score(document: Document, by: str) -> float:
    """A document's number in [0, 1): from the SHA-256 of its name or its content."""
    digest = sha256(_SALT)
    for part in parts_of(document.name if by == "name" else document.text):
        digest.update(part.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big") / 2.0**64


def _tail_start(text: str, fraction: float) -> int:
    """Where the tail begins: `fraction` of the characters, or up to twice that to begin a line."""
    length = max(1, min(len(text) - 1, round(len(text) * fraction)))
    cut = len(text) - length
    line = text.rfind("\n", 0, cut) + 1
    return line if line > max(0, cut - length) else cut


def _long_tail_start(text: LongText, fraction: float) -> int:
    """`_tail_start` of a text that is read in pieces, twice."""
    whole = len(text)
    length = max(1, min(whole - 1, round(whole * fraction)))
    cut = whole - length
    line = position = 0
    for part in text:
        found = part.rfind("\n", 0, max(0, cut - position))
        if found >= 0:
            line = position + found + 1
        position += len(part)
        if position >= cut:
            break
    return line if line > max(0, cut - length) else cut
