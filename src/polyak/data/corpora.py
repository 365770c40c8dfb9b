"""Corpora: sequences of documents, by name or by path, with a fingerprint and a fixed split."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from polyak.data import hub, python_sources, sources
from polyak.data.documents import Document, LongText, Text, parts_of
from polyak.data.encodings import DEFAULT, check_encoding
from polyak.data.left_out import LeftOut
from polyak.errors import ConfigError, DataError, UnknownNameError, unknown

__all__ = ["NAMES", "Corpus", "Document", "Splitter", "known_names", "load_corpus"]

NAMES: dict[str, Callable[[], tuple[Iterable[Document], str, LeftOut]]] = {
    "stdlib": python_sources.stdlib,
    "prose": python_sources.prose,
}

SIDES = ("train", "validation")
FRACTION = 0.05

# Part of every document's hash. Changing it changes every split, so it never changes.
_SPLIT_SALT = b"polyak split 1:"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Named documents in a fixed order.

    Attributes:
        name: The corpus name, or the file's or folder's own name.
        documents: The documents; can be iterated any number of times and is read as it goes, so
            that a corpus larger than memory works.
        fingerprint: SHA-256 over the names and contents (for JSONL and Parquet the bytes of the
            files and the text field), independent of where the files lie.
        split_by: What decides a document's side: the name where documents are files (editing a
            file doesn't move it), the content where they are records (inserting a record
            doesn't move the others, and duplicates stay on one side), nothing where the corpus
            has a split of its own.
        left_out: The files left out, by reason.
        sides: The sides of the split: training, validation, and test where there is one.
        empty_sides: Those that the corpus has nothing for: it is meant for evaluation only.
        fraction: Share of the documents held out when nobody asks for another.
    """

    name: str
    documents: Iterable[Document]
    fingerprint: str
    split_by: Literal["name", "content", "own"] = "name"
    left_out: LeftOut = field(default_factory=LeftOut)
    sides: tuple[str, ...] = SIDES
    empty_sides: tuple[str, ...] = ()
    fraction: float = FRACTION

    def split(self, fraction: float | None = None) -> tuple[Corpus, Corpus]:
        """(train, validation), split by document; see `Splitter`. A test side is left out."""
        fraction = self.fraction if fraction is None else fraction
        splitter = self.splitter(fraction)
        train, validation = (
            replace(
                self,
                name=f"{self.name}:{side}",
                documents=_Side(self.documents, splitter, index),
                fingerprint=self.side_fingerprint(fraction, side),
            )
            for index, side in enumerate(SIDES)
        )
        return train, validation

    def side_fingerprint(self, fraction: float, side: str) -> str:
        """The fingerprint of one side of a split, known without reading any document."""
        return sha256(f"{self.fingerprint} {fraction!r} {side}".encode()).hexdigest()

    def splitter(self, fraction: float | None = None) -> Splitter:
        """Decide the split; reads documents only until both sides are known not to be empty.

        Raises:
            ConfigError: `fraction` is not between 0 and 1.
            DataError: the corpus holds no text, or a single character.
        """
        fraction = self.fraction if fraction is None else fraction
        check_fraction(fraction)
        if self.split_by == "own":
            return Splitter(fraction=fraction, by="own", sides=self.sides)
        count, longest = 0, 0
        lowest, highest = (2.0, ""), (-1.0, "")
        for document in self.documents:
            if not document.text:
                continue
            short = isinstance(document.text, str) and len(document.text) < 2
            count, longest = count + 1, max(longest, 1 if short else 2)
            scored = (_score(document, self.split_by), document.name)
            lowest, highest = min(lowest, scored), max(highest, scored)
            if lowest[0] < fraction <= highest[0]:
                return Splitter(fraction=fraction, by=self.split_by)
        if count == 0:
            raise DataError(f"corpus {self.name!r} is empty: it holds no document with any text")
        if count == 1:
            if longest < 2:
                raise DataError(
                    f"corpus {self.name!r} is a single character, which cannot be split into "
                    "training and validation text; give it more text"
                )
            return Splitter(fraction=fraction, by="tail")
        if lowest[0] >= fraction:
            return Splitter(fraction=fraction, by=self.split_by, only_validation=lowest[1])
        return Splitter(fraction=fraction, by=self.split_by, only_train=highest[1])


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """Which side of the split a document is on: a fixed function of the document alone.

    A document is held out when the SHA-256 of its name (or content), read as a number in [0, 1),
    is below `fraction`; so adding a document never moves another. Where that leaves a side of
    two or more documents empty, the document with the lowest (highest) number is its only one.
    A corpus of a single document is cut in two: its tail, back to a line's start, is held out.
    A corpus with a split of its own keeps it. Empty documents are on neither side.
    """

    fraction: float
    by: Literal["name", "content", "tail", "own"]
    only_validation: str | None = None
    only_train: str | None = None
    sides: tuple[str, ...] = SIDES

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
        if self.only_validation is not None:
            held_out = document.name == self.only_validation
        elif self.only_train is not None:
            held_out = document.name != self.only_train
        else:
            held_out = _score(document, self.by) < self.fraction
        return (None, text) if held_out else (text, None)

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
        return {"fraction": self.fraction, "by": self.by, "rule": rule}


@dataclass(frozen=True)
class _Side:
    documents: Iterable[Document]
    splitter: Splitter
    index: int

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            text = self.splitter.divide(document)[self.index]
            if text is not None:
                yield Document(document.name, text)


def known_names() -> tuple[str, ...]:
    """The names that `load_corpus` knows."""
    return (*NAMES, *hub.HUB)


def load_corpus(name_or_path: str, *, text_field: str = "text", encoding: str = DEFAULT) -> Corpus:
    r"""A corpus by name (`stdlib`, `prose`, `tinystories`, …, see `hub.HUB`) or by path.

    A path is a text file, a JSONL file (`.jsonl`, `.ndjson`, also `.gz`; one object a line), a
    `.json` file with a list of objects, a Parquet file, or a folder of such files, searched
    recursively. A name wins over a file of that name, with a warning; write `./stdlib` for the
    file. Every file is read once here, for the
    fingerprint; the hub is not contacted here.

    Args:
        name_or_path: What to load.
        text_field: The field that holds the text of a JSONL or Parquet record.
        encoding: Of text files and JSON; the corpora of a name have their own.

    Raises:
        UnknownNameError: Neither a known name nor a path that exists.
        ConfigError: No such encoding, or one for a corpus that has its own.
        DataError: Unreadable, empty or binary.
        MissingExtraError: Parquet without pyarrow.
    """
    if name_or_path in NAMES:
        _check_name(name_or_path, encoding)
        documents, fingerprint, left_out = NAMES[name_or_path]()
        return Corpus(
            name=name_or_path, documents=documents, fingerprint=fingerprint, left_out=left_out
        )
    found_on_hub = hub.parse(name_or_path)
    if found_on_hub is not None:
        _check_name(name_or_path, encoding)
        found_on_hub.text_field = text_field
        own = found_on_hub.corpus.own_sides
        return Corpus(
            name=name_or_path,
            documents=found_on_hub,
            fingerprint=found_on_hub.fingerprint,
            split_by="own" if own else "content",
            sides=(*SIDES, *(side for side in own if side not in SIDES)),
            empty_sides=tuple(side for side in SIDES if side not in own) if own else (),
            fraction=found_on_hub.corpus.held_out,
        )
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError:  # "~nobody/…": no such user
        path = Path(name_or_path)
    if not name_or_path or not sources.exists(path):
        problem = unknown("corpus", name_or_path.partition("[")[0], known_names())
        raise UnknownNameError(f"{problem}; and there is no file or folder of that name")
    found = sources.scan(path, text_field, encoding)
    return Corpus(
        # Names of files can be undecodable; the corpus's goes into JSON.
        name=os.fsencode(path.resolve().name or "root").decode("utf-8", "replace"),
        documents=found.documents,
        fingerprint=found.fingerprint,
        split_by="content" if found.has_records else "name",
        left_out=found.left_out,
    )


def _check_name(name: str, encoding: str) -> None:
    """A name's own encoding stays, and a file or folder that it hides is said."""
    if check_encoding(encoding) != DEFAULT:
        raise ConfigError(
            f"encoding={encoding!r}: corpus {name!r} has its own; leave encoding out, or write "
            f"./{name} for a file or folder of that name"
        )
    there = Path(name.partition("[")[0])
    if there.exists():
        kind = "folder" if there.is_dir() else "file"
        warnings.warn(
            f"corpus {name!r} is polyak's own of that name; for the {kind} {there} that lies here, "
            f"write ./{there}",
            stacklevel=1,
        )


def check_fraction(fraction: float) -> None:
    """Raise `ConfigError` unless 0 < fraction < 1."""
    if not 0.0 < fraction < 1.0:
        raise ConfigError(
            f"validation_fraction={fraction!r} must lie strictly between 0 and 1, such as 0.05"
        )


def _score(document: Document, by: str) -> float:
    digest = sha256(_SPLIT_SALT)
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
