"""Turn a corpus into memory-mapped token shards with a hashed manifest, once per fingerprint.

A prepared folder holds `train-00000.bin`, … and `validation-00000.bin`, … (raw little-endian
ids; `test-00000.bin`, … where the corpus has a test side), the tokenizer and `manifest.json`.
Every document is followed by one end-of-text token. Neither the number of processes nor any
number of kills on the way changes a byte.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak import formats
from polyak.checks import check_whole
from polyak.data import journal
from polyak.data.corpora import Corpus, load_corpus
from polyak.data.documents import open_reader
from polyak.data.encode import Arrays, Chunk, Encoder, chunks
from polyak.data.encodings import DEFAULT
from polyak.data.hub import HubDocuments, HubError
from polyak.data.left_out import RECORD, in_words
from polyak.data.shards import ShardWriter, TokenFile, check_shards
from polyak.data.split import NEAR, SPLIT, Splitter, check_fraction, check_split
from polyak.data.tokenizer_names import TokenizerName, load_tokenizer, parse_name
from polyak.data.tokenizers import BPETokenizer, Tokenizer
from polyak.data.workspace import building, default_cache, discard, resumable
from polyak.errors import ConfigError, DataError, MissingExtraError
from polyak.files import write_json
from polyak.reading import (
    fields,
    file_name,
    list_of,
    mapping_of,
    one_of,
    optional,
    table,
    text,
    whole,
)

_SIDES = ("train", "validation")
SHARD_TOKENS = 64 * 2**20
SAVE_SECONDS = 5.0


class Done(NamedTuple):
    """How far a preparation has come."""

    documents: int
    text_bytes: int
    tokens: int
    found_bytes: int
    """What of `text_bytes` had been done before a kill."""
    all_bytes: int | None = None
    """`text_bytes` at the end, where that is known before: of text files."""


Progress = Callable[[Done], None]


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus: token ids of both sides, and how they came about.

    `test` is None where the corpus has no test side. A corpus for evaluation has no token on its
    training side.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    test: TokenFile | None = None
    left_out: Mapping[str, Any] = field(default_factory=dict)
    """Files that the corpus does without, by reason, as `LeftOut.record` has them."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over corpus, tokenizer and split: equal fingerprints, equal tokens."""
        return str(self.manifest["fingerprint"])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A request to prepare: checked, and with its place in the cache."""

    corpus: Corpus
    tokenizer: TokenizerName
    fraction: float
    split: int
    near: float
    shard_tokens: int
    cache: Path
    made: Tokenizer | None  # a tokenizer read from a path is known from the beginning

    @property
    def final(self) -> Path:
        chosen = self.tokenizer.name if self.made is None else f"path {self.made.fingerprint}"
        key = _key(
            *("prepared", 1, self.corpus.fingerprint, chosen, self.fraction),
            *(self.shard_tokens, self.tokenizer.library),
            *(() if self.split == 1 else ("split", self.split, self.near)),
        )
        shown = self.tokenizer.name if self.made is None else self.made.name
        return self.cache / "prepared" / f"{_slug(self.corpus.name)}-{_slug(shown)}-{key}"


def prepare(
    corpus: str,
    tokenizer: str = "bytes",
    *,
    text_field: str = "text",
    encoding: str = DEFAULT,
    cache: Path | None = None,
    validation_fraction: float | None = None,
    split: int = SPLIT,
    near_duplicates: float = NEAR,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    save_seconds: float = SAVE_SECONDS,
    progress: Progress | None = None,
) -> Prepared:
    """The prepared form of a corpus: from the cache if it is there, otherwise made now.

    The folder appears under its final name only when it is complete, so a killed preparation
    leaves nothing that looks finished; the same call goes on where it was killed. Two processes
    may ask for the same corpus at once: one works, the other waits. The corpus streams through:
    memory holds some megabytes of text per worker, or the longest record. A cached folder that is
    damaged is made anew, with a warning. A corpus of the hub that is in the cache is not asked
    for again.

    Args:
        corpus: A name or path, see `load_corpus`.
        tokenizer: `bytes`, `gpt2`, `bpe-N` (trained on the training side, cached separately), or
            the path of a tokenizer, see `read_tokenizer`.
        text_field: The field with the text of JSONL, Parquet and hub records.
        encoding: Of text files and JSON.
        cache: Where prepared corpora are kept; `default_cache()` if None.
        validation_fraction: Share of the documents held out, between 0 and 1; the corpus's own if
            None (0.05 of most). Only for corpora without a split of their own.
        split: Version of the split, see `polyak.data.split`.
        near_duplicates: Share of a held-out document's 200-byte windows that may occur on the
            training side; it is left out otherwise. Not looked for in corpora of the hub.
        shard_tokens: Tokens in a shard at most.
        workers: Processes that encode; 1: only this one; None: one per core, if it is worth it.
        save_seconds: What is done is flushed and recorded so often: as much is lost in a kill.
        progress: Called with what is done so far, now and then.

    Raises:
        ConfigError, UnknownNameError, DataError, MissingExtraError: what the user can fix.
        HubError: a `DataError`; the hub cannot be reached. What is done is kept.
    """
    check_whole("workers", workers, optional=True)
    plan = _plan(
        corpus,
        tokenizer,
        text_field,
        encoding,
        cache,
        validation_fraction,
        split,
        near_duplicates,
        shard_tokens,
    )
    left_out, final = plan.corpus.left_out.record(), plan.final
    say_left_out(plan.corpus.name, left_out)
    if final.exists():
        try:
            return replace(open_prepared(final), left_out=left_out)
        except DataError as problem:
            warnings.warn(f"{problem}; preparing {plan.corpus.name!r} again", stacklevel=2)
            discard(final)
    with resumable(final) as folder:
        if folder is not None:
            _Preparation(plan, folder, workers, save_seconds, progress).run()
    return replace(open_prepared(final, verify=False), left_out=left_out)


def say_left_out(name: str, left_out: Mapping[str, Any]) -> None:
    """Warn of the files that a corpus does without, where there are any."""
    if left_out:
        warnings.warn(f"left out of corpus {name!r}: {in_words(left_out)}", stacklevel=1)


def verify(
    corpus: str,
    tokenizer: str = "bytes",
    *,
    text_field: str = "text",
    encoding: str = DEFAULT,
    cache: Path | None = None,
    validation_fraction: float | None = None,
    split: int = SPLIT,
    near_duplicates: float = NEAR,
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared:
    """The prepared form of a corpus in the cache, every shard checked by its hash; never made.

    Raises:
        DataError: it is not there, or it is damaged (the file is named).
    """
    plan = _plan(
        corpus,
        tokenizer,
        text_field,
        encoding,
        cache,
        validation_fraction,
        split,
        near_duplicates,
        shard_tokens,
    )
    if not plan.final.exists():
        partial = plan.final.with_name(f".partial-{plan.final.name}").is_dir()
        state = "only partly prepared" if partial else "not prepared"
        raise DataError(
            f"corpus {corpus!r} with tokenizer {tokenizer!r} is {state} in {plan.cache}"
        )
    return open_prepared(plan.final)


def open_prepared(folder: Path, verify: bool = True) -> Prepared:
    """Open a prepared folder.

    Sizes are always checked; with `verify` the SHA-256 of every shard too (about a second per
    gigabyte).

    Raises:
        DataError: not a prepared folder, or a shard is missing, truncated or corrupt (named).
    """
    manifest = formats.read(folder / "manifest.json", "prepared", error=DataError)
    fields(manifest, str(folder / "manifest.json"), _MANIFEST, error=DataError)
    try:
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
            raise DataError(f"the tokenizer in {folder} is not the one of its manifest")
        dtype, name = np.dtype(manifest["dtype"]), manifest["corpus"]["name"]
        sides = {
            side: TokenFile(
                list(check_shards(folder, manifest[side]["shards"], dtype, hashes=verify)),
                dtype,
                byte_table=tokenizer.byte_table,
                label=f"the {side} side of corpus {name!r}",
            )
            for side in (*_SIDES, *(["test"] if "test" in manifest else []))
        }
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise DataError(f"{folder / 'manifest.json'} is not a manifest: {problem!r}") from problem
    left_out = manifest["corpus"].get("skipped_files", {})
    return Prepared(folder, manifest, tokenizer, **sides, left_out=left_out)


_SHARD = {
    "file": file_name,
    "tokens": whole(0, 2**40),
    "text_bytes": whole(),
    "sha256": text(64),
}
_SIDE = table(
    {
        "documents": whole(),
        "tokens": whole(),
        "text_bytes": whole(),
        "shards": list_of(table(_SHARD), 100_000),
    }
)
_MANIFEST = {
    "fingerprint": text(64),
    "dtype": one_of(
        "<u2", "<u4"
    ),  # never one of objects, which are pointers of the file's choosing
    "corpus": table(
        {
            "name": text(4096),
            "fingerprint": text(64),
            "skipped": mapping_of(whole(), 100),
            "skipped_files": optional(RECORD),
        }
    ),
    "tokenizer": table({"name": text(4096), "fingerprint": text(64), "vocab_size": whole()}),
    "split": table({"rule": text()}),
    "train": _SIDE,
    "validation": _SIDE,
    "test": optional(_SIDE),
}
"""What a manifest must look like before anything that it names is opened."""


class _Preparation:
    """Writes a prepared folder, going on from what is in it."""

    def __init__(
        self,
        plan: _Plan,
        folder: Path,
        workers: int | None,
        save_seconds: float,
        progress: Progress | None,
    ) -> None:
        self.plan, self.folder = plan, folder
        self.workers, self.save_seconds, self.progress = workers, save_seconds, progress
        self.empty = self.found_bytes = 0
        self.saved = False  # whether there is a place to go on from
        self.hopeless = False  # whether the corpus itself has to change first
        self.writers: list[ShardWriter] = []

    def run(self) -> None:
        """Do it all; on an error, remove what was done if a repetition cannot go on from it."""
        try:
            self._run()
        except BaseException:
            for writer in self.writers:
                writer.abandon()
            if self.hopeless or not self.saved:
                self._remove()
            raise

    def _run(self) -> None:
        plan, corpus = self.plan, self.plan.corpus
        source = corpus.documents if isinstance(corpus.documents, HubDocuments) else None
        revision = None if source is None else source.connect()
        splitter = corpus.splitter(plan.fraction, version=plan.split, near=plan.near)
        tokenizer = _tokenizer(self.plan, splitter)
        heading = {"polyak preparation": 1, "tokenizer": tokenizer.fingerprint, "of": revision}
        log = journal.Journal(self.folder, heading)
        place = log.resume(tokenizer.dtype)
        if place is None:
            log.start()
            place = {"read": None, "parts": 0, "empty": 0, "sides": {}}
        else:
            self.saved = True
        tokenizer.save(self.folder)
        self.empty = place["empty"]
        self.writers = [
            ShardWriter(
                *(self.folder, side, tokenizer.dtype, self.plan.shard_tokens),
                state=place["sides"].get(side),
            )
            for side in splitter.sides
        ]
        self.found_bytes = sum(writer.text_bytes for writer in self.writers)
        reader = open_reader(corpus.documents, place["read"])
        given = chunks(reader, splitter, tokenizer, skip=place["parts"])
        sides = len(splitter.sides)
        with Encoder(tokenizer, self.folder, sides, self.workers) as encoder:
            self._write(encoder.map(self._watched(given)), tokenizer, splitter, log)
        written = {
            side: writer.finish() for side, writer in zip(splitter.sides, self.writers, strict=True)
        }
        self._manifest(tokenizer, splitter, source, revision, written)

    def _watched(self, given: Iterator[Chunk]) -> Iterator[Chunk]:
        try:
            yield from given
        except HubError:
            raise
        except (DataError, MissingExtraError):
            self.hopeless = True
            raise

    def _write(
        self,
        encoded: Iterator[tuple[Chunk, Arrays]],
        tokenizer: Tokenizer,
        splitter: Splitter,
        log: journal.Journal,
    ) -> None:
        table = tokenizer.byte_table
        saved = time.monotonic()
        for chunk, arrays in encoded:
            for writer, ids, begun in zip(self.writers, arrays, chunk.documents, strict=True):
                writer.write(ids, table[ids])
                writer.documents += begun
            self.empty += chunk.empty
            if time.monotonic() - saved >= self.save_seconds:
                named = zip(splitter.sides, self.writers, strict=True)
                states = {side: writer.state() for side, writer in named}
                read, parts = chunk.place
                log.add({"read": read, "parts": parts, "empty": self.empty, "sides": states})
                saved, self.saved = time.monotonic(), True
            if self.progress is not None:
                self.progress(
                    Done(
                        sum(writer.documents for writer in self.writers),
                        sum(writer.text_bytes for writer in self.writers),
                        sum(writer.tokens for writer in self.writers),
                        self.found_bytes,
                        getattr(self.plan.corpus.documents, "text_bytes", None),
                    )
                )

    def _manifest(
        self,
        tokenizer: Tokenizer,
        splitter: Splitter,
        source: HubDocuments | None,
        revision: str | None,
        written: dict[str, Any],
    ) -> None:
        corpus, split = self.plan.corpus, splitter.describe()
        skipped = corpus.left_out.counts | ({"empty": self.empty} if self.empty else {})
        about = {"name": corpus.name, "fingerprint": corpus.fingerprint, "skipped": skipped}
        if corpus.left_out:
            about["skipped_files"] = corpus.left_out.record()
        parts: list[object] = [corpus.fingerprint, tokenizer.fingerprint, split]
        if source is not None:
            about["hub"] = source.describe()
            parts.append(revision)
        manifest = {
            "format": formats.current("prepared"),
            "fingerprint": _key(*parts, full=True),
            "corpus": about,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
            },
            "dtype": tokenizer.dtype.str,
            "split": {"version": splitter.version, **split},
            **written,
        }
        write_json(self.folder / "manifest.json", manifest, error=DataError)
        (self.folder / journal.NAME).unlink()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


def _plan(
    corpus: str,
    tokenizer: str,
    text_field: str,
    encoding: str,
    cache: Path | None,
    fraction: float | None,
    split: int,
    near: float,
    shard_tokens: int,
) -> _Plan:
    check_split(split, near)
    check_whole("shard_tokens", shard_tokens)
    name = parse_name(tokenizer)
    if fraction is not None:
        check_fraction(fraction)
    loaded = load_corpus(corpus, text_field=text_field, encoding=encoding)
    if fraction is not None and loaded.split_by == "own":
        raise ConfigError(
            f"validation_fraction={fraction!r}: corpus {corpus!r} has a split of its own; leave "
            "validation_fraction out"
        )
    if name.size is not None and "train" in loaded.empty_sides:
        raise ConfigError(
            f"tokenizer {tokenizer!r} would be trained on corpus {corpus!r}, which is for "
            "evaluation and has no training side; give 'gpt2', 'bytes', or the path of the "
            "tokenizer of the model to evaluate"
        )
    return _Plan(
        corpus=loaded,
        tokenizer=name,
        fraction=loaded.fraction if fraction is None else fraction,
        split=1 if loaded.near is None else split,  # the same for corpora of the hub
        near=near,
        shard_tokens=shard_tokens,
        cache=default_cache() if cache is None else cache,
        made=None if name.path is None else name.load(),
    )


def _tokenizer(plan: _Plan, splitter: Splitter) -> Tokenizer:
    if plan.made is not None:
        return plan.made
    size, corpus = plan.tokenizer.size, plan.corpus
    if size is None:
        return plan.tokenizer.load()
    side = corpus.side_fingerprint(splitter, "train")
    key = _key("tokenizer", 1, side, size, plan.tokenizer.library)
    final = plan.cache / "tokenizers" / f"{_slug(corpus.name)}-bpe-{size}-{key}"
    if final.exists():
        try:
            return load_tokenizer(final)
        except DataError as problem:
            warnings.warn(f"{problem}; training it again", stacklevel=5)
            discard(final)
    train, _ = corpus.sides_of(splitter)
    tokenizer = BPETokenizer.train((document.text for document in train.documents), size)
    with building(final) as folder:
        tokenizer.save(folder)
    return tokenizer


def _key(*parts: object, full: bool = False) -> str:
    digest = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return digest if full else digest[:16]


def _slug(name: str) -> str:
    """A name as part of a file name on every system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")[:60] or "corpus"
