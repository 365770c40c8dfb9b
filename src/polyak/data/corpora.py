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
from polyak.data.documents import Document
from polyak.data.encodings import DEFAULT, check_encoding
from polyak.data.left_out import LeftOut
from polyak.data.split import (
    NEAR,
    SIDES,
    SPLIT,
    Apart,
    By,
    Splitter,
    check_fraction,
    check_split,
    decide,
    without_shared,
)
from polyak.errors import ConfigError, UnknownNameError, unknown

__all__ = ["NAMES", "Corpus", "Document", "Splitter", "known_names", "load_corpus"]

NAMES: dict[str, Callable[[], tuple[Iterable[Document], str, LeftOut]]] = {
    "stdlib": python_sources.stdlib,
    "prose": python_sources.prose,
}

FRACTION = 0.05


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
            has a split of its own. In version 2 of the split, the content of users' files, too.
        near: What becomes of held-out documents that share text with the training side, in
            version 2 of the split: `train` of the corpora that come with Python (with no window in
            common at all), `nowhere` of users' files; None: not looked for, in corpora of the hub,
            which are read once.
        left_out: The files left out, by reason.
        sides: The sides of the split: training, validation, and test where there is one.
        empty_sides: Those that the corpus has nothing for: it is meant for evaluation only.
        fraction: Share of the documents held out when nobody asks for another.
    """

    name: str
    documents: Iterable[Document]
    fingerprint: str
    split_by: Literal["name", "content", "own"] = "name"
    near: Apart | None = "nowhere"
    left_out: LeftOut = field(default_factory=LeftOut)
    sides: tuple[str, ...] = SIDES
    empty_sides: tuple[str, ...] = ()
    fraction: float = FRACTION

    def sides_of(self, splitter: Splitter) -> tuple[Corpus, Corpus]:
        """(train, validation), as a splitter divides it. A test side is left out."""
        train, validation = (
            replace(
                self,
                name=f"{self.name}:{side}",
                documents=_Side(self.documents, splitter, index),
                fingerprint=self.side_fingerprint(splitter, side),
            )
            for index, side in enumerate(SIDES)
        )
        return train, validation

    def split(
        self, fraction: float | None = None, *, version: int = SPLIT, near: float = NEAR
    ) -> tuple[Corpus, Corpus]:
        """(train, validation), split by document; see `splitter`. A test side is left out."""
        return self.sides_of(self.splitter(fraction, version=version, near=near))

    def side_fingerprint(self, splitter: Splitter, side: str) -> str:
        """The fingerprint of one side of a split."""
        how = [f"{self.fingerprint} {splitter.fraction!r} {side}"]
        if splitter.version > 1:
            how.append(f"{splitter.version} {splitter.found.get('threshold')}")
        return sha256(" ".join(how).encode()).hexdigest()

    def splitter(
        self, fraction: float | None = None, *, version: int = SPLIT, near: float = NEAR
    ) -> Splitter:
        """Decide the split.

        Version 1 reads documents only until both sides are known not to be empty. Version 2 reads
        all of them, twice where `near` is not None: equal documents are on one side, and held-out
        ones that share text with the training side are not held out (`split.without_shared`).

        Args:
            fraction: share of the documents that is held out; None: the corpus's own.
            version: of the split.
            near: share of a held-out document's windows that may occur on the training side; of
                the corpora that come with Python none may.

        Raises:
            ConfigError: `fraction`, `version` or `near` is out of range.
            DataError: the corpus holds no text or a single character, or nothing can be held out.
        """
        fraction = self.fraction if fraction is None else fraction
        check_fraction(fraction)
        check_split(version, near)
        if self.split_by == "own":
            return Splitter(fraction=fraction, by="own", sides=self.sides)
        by: By = self.split_by
        if version > 1 and self.near == "nowhere":
            by = "content"
        found = decide(self.documents, self.name, fraction, by, version)
        if version == 1 or found.by == "tail" or self.near is None or near >= 1:
            return found
        most = 0.0 if self.near == "train" else near
        return without_shared(self.documents, found, self.name, most, self.near)


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
            name=name_or_path,
            documents=documents,
            fingerprint=fingerprint,
            left_out=left_out,
            near="train",
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
            near=None,
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
