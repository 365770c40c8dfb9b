"""Turn a corpus into memory-mapped token shards with a hashed manifest, once per fingerprint.

A prepared folder holds `train-00000.bin`, … and `validation-00000.bin`, … (raw little-endian
ids), the tokenizer and `manifest.json`. Every document is followed by one end-of-text token.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyak.data.corpora import Corpus, Splitter, check_fraction, load_corpus
from polyak.data.shards import ShardWriter, TokenFile, check_shards
from polyak.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    parse_name,
)
from polyak.data.workspace import building, default_cache, discard
from polyak.errors import ConfigError, DataError
from polyak.files import read_json, write_json

_FORMAT = 1
_SIDES = ("train", "validation")
SHARD_TOKENS = 64 * 2**20

# Characters that are encoded together, so that a tokenizer can use all cores.
_TOGETHER = 1 << 22

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus: token ids of both sides, and how they came about."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile

    @property
    def fingerprint(self) -> str:
        """SHA-256 over corpus, tokenizer and split: equal fingerprints, equal tokens."""
        return str(self.manifest["fingerprint"])


def prepare(
    corpus: str,
    tokenizer: str = "bytes",
    *,
    text_field: str = "text",
    cache: Path | None = None,
    validation_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Prepared:
    """The prepared form of a corpus: from the cache if it is there, otherwise made now.

    The folder appears under its final name only when it is complete, so a killed preparation
    leaves nothing that looks finished, and two processes may prepare the same corpus at once.
    The corpus streams through: memory holds a few megabytes of text, or the longest document.
    A cached folder that is damaged is made anew, with a warning.

    Args:
        corpus: A name or path, see `load_corpus`.
        tokenizer: `bytes` or `bpe-N` (trained on the training side, cached separately).
        text_field: The field with the text of JSONL and Parquet records.
        cache: Where prepared corpora are kept; `default_cache()` if None.
        validation_fraction: Share of the documents held out, between 0 and 1.
        shard_tokens: Tokens in a shard at most.
        progress: Called with (documents, characters) done so far, now and then.

    Raises:
        ConfigError, UnknownNameError, DataError, MissingExtraError: what the user can fix.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens={shard_tokens} must be at least 1")
    vocab_size = parse_name(tokenizer)
    check_fraction(validation_fraction)
    loaded = load_corpus(corpus, text_field=text_field)
    cache = default_cache() if cache is None else cache
    key = _key(
        *("prepared", _FORMAT, loaded.fingerprint, tokenizer, validation_fraction, shard_tokens),
        _library(vocab_size),
    )
    final = cache / "prepared" / f"{_slug(loaded.name)}-{tokenizer}-{key}"
    if final.exists():
        try:
            return open_prepared(final)
        except DataError as problem:
            warnings.warn(f"{problem}; preparing {loaded.name!r} again", stacklevel=2)
            discard(final)
    splitter = loaded.splitter(validation_fraction)
    made = _tokenizer(loaded, splitter, vocab_size, cache)
    with building(final) as folder:
        _write(folder, loaded, splitter, made, shard_tokens, progress)
    return open_prepared(final, verify=False)


def open_prepared(folder: Path, verify: bool = True) -> Prepared:
    """Open a prepared folder.

    Sizes are always checked; with `verify` the SHA-256 of every shard too (about a second per
    gigabyte).

    Raises:
        DataError: not a prepared folder, or a shard is missing, truncated or corrupt (named).
    """
    manifest = read_json(folder / "manifest.json", error=DataError)
    try:
        if manifest["format"] != _FORMAT:
            raise DataError(
                f"{folder / 'manifest.json'} has format {manifest['format']!r}; this version of "
                f"polyak reads format {_FORMAT}, so prepare the corpus again"
            )
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
            raise DataError(f"the tokenizer in {folder} is not the one of its manifest")
        dtype, name = np.dtype(manifest["dtype"]), manifest["corpus"]["name"]
        train, validation = (
            TokenFile(
                list(check_shards(folder, manifest[side]["shards"], dtype, hashes=verify)),
                dtype,
                byte_table=tokenizer.byte_table,
                label=f"the {side} side of corpus {name!r}",
            )
            for side in _SIDES
        )
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise DataError(f"{folder / 'manifest.json'} is not a manifest: {problem!r}") from problem
    return Prepared(folder, manifest, tokenizer, train, validation)


def _write(
    folder: Path,
    corpus: Corpus,
    splitter: Splitter,
    tokenizer: Tokenizer,
    shard_tokens: int,
    progress: Progress | None,
) -> None:
    tokenizer.save(folder)
    table = tokenizer.byte_table
    writers = [ShardWriter(folder, side, tokenizer.dtype, shard_tokens) for side in _SIDES]
    none, end = np.empty(0, np.int64), np.array([tokenizer.end_of_text])
    empty = characters = 0
    try:
        for batch in _batches(corpus, splitter, tokenizer):
            encoded = tokenizer.encode_many([part.text for part in batch])
            for side, writer in enumerate(writers):
                found = [none]
                for part, ids in zip(batch, encoded, strict=True):
                    if part.side == side:
                        found += [ids, end] if part.last else [ids]
                        writer.documents += part.last
                joined = np.concatenate(found)
                writer.write(joined, table[joined])
            empty += sum(part.side is None for part in batch)
            characters += sum(len(part.text) for part in batch)
            if progress is not None:
                progress(sum(writer.documents for writer in writers), characters)
        sides = {side: writer.finish() for side, writer in zip(_SIDES, writers, strict=True)}
    finally:
        for writer in writers:
            writer.abandon()
    split = splitter.describe()
    skipped = dict(corpus.skipped) | ({"empty": empty} if empty else {})
    manifest = {
        "format": _FORMAT,
        "fingerprint": _key(corpus.fingerprint, tokenizer.fingerprint, split, full=True),
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint, "skipped": skipped},
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
        },
        "dtype": tokenizer.dtype.str,
        "split": split,
        **sides,
    }
    write_json(folder / "manifest.json", manifest, error=DataError)


class _Part(NamedTuple):
    side: int | None  # None: an empty document, which is on neither side
    text: str
    last: bool  # whether its document ends here


def _batches(corpus: Corpus, splitter: Splitter, tokenizer: Tokenizer) -> Iterator[list[_Part]]:
    """The corpus cut into parts, in lists of a few megabytes each."""
    batch: list[_Part] = []
    size = 0
    for document in corpus.documents:
        if not document.text:
            batch.append(_Part(None, "", False))
        for side, whole in enumerate(splitter.divide(document)):
            for text, last in _flag_last(tokenizer.pieces(whole or "")):
                batch.append(_Part(side, text, last))
                size += len(text)
                if size >= _TOGETHER:
                    yield batch
                    batch, size = [], 0
    yield batch


def _flag_last(parts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    current = next(parts, None)
    while current is not None:
        following = next(parts, None)
        yield current, following is None
        current = following


def _tokenizer(
    corpus: Corpus, splitter: Splitter, vocab_size: int | None, cache: Path
) -> Tokenizer:
    if vocab_size is None:
        return ByteTokenizer()
    side = corpus.side_fingerprint(splitter.fraction, "train")
    key = _key("tokenizer", _FORMAT, side, vocab_size, _library(vocab_size))
    final = cache / "tokenizers" / f"{_slug(corpus.name)}-bpe-{vocab_size}-{key}"
    if final.exists():
        try:
            return load_tokenizer(final)
        except DataError as problem:
            warnings.warn(f"{problem}; training it again", stacklevel=3)
            discard(final)
    train, _ = corpus.split(splitter.fraction)
    tokenizer = BPETokenizer.train((document.text for document in train.documents), vocab_size)
    with building(final) as folder:
        tokenizer.save(folder)
    return tokenizer


def _library(vocab_size: int | None) -> str:
    return "" if vocab_size is None else version("tokenizers")


def _key(*parts: object, full: bool = False) -> str:
    digest = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return digest if full else digest[:16]


def _slug(name: str) -> str:
    """A name as part of a file name on every system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".")[:60] or "corpus"
