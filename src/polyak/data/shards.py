"""Token shards: raw little-endian ids on disk, read through a memory map."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from polyak.errors import DataError
from polyak.files import sha256_of
from polyak.reading import inside

Array = npt.NDArray[Any]


class Tokens(Protocol):
    """A long sequence of token ids: an array or a `TokenFile`."""

    def __len__(self) -> int:
        """The number of tokens."""
        ...

    def __getitem__(self, index: slice, /) -> Array:
        """Some consecutive tokens."""
        ...


class TokenFile:
    """The tokens of consecutive shards as one sequence, mapped into memory and never copied whole.

    Args:
        paths: The shard files, in order.
        dtype: Their element type, `<u2` or `<u4`.
        byte_table: Bytes of text per token id, see `Tokenizer.byte_table`.
        label: What errors call it: `validation split of stdlib`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        dtype: np.dtype[Any],
        *,
        byte_table: npt.NDArray[np.int64],
        label: str,
    ) -> None:
        self.paths = tuple(paths)
        self.dtype = dtype
        self.byte_table = byte_table
        self.label = label
        self._maps: list[Array] = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._maps])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._maps else 0

    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array: ...
    def __getitem__(self, index: int | slice, /) -> int | Array:
        """One id, or the ids of a slice as a new array of the shards' type."""
        if not isinstance(index, slice):
            position = range(len(self))[index]
            return int(self._range(position, position + 1)[0])
        start, stop, step = index.indices(len(self))
        if step == 1:
            return self._range(start, stop)
        chosen = range(start, stop, step)
        if not chosen:
            return np.empty(0, self.dtype)
        low, high = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
        return self._range(low, high + 1)[::step]

    def _range(self, start: int, stop: int) -> Array:
        """Tokens start…stop−1 as a copy: a view would keep a slice of the map alive.

        Raises:
            DataError: an id that the tokenizer does not have, which a model would look up.
        """
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[shard]) - len(self._maps[shard])
            part = self._maps[shard][start - first : stop - first]
            parts.append(np.asarray(part))
            start += len(part)
            shard += 1
        found: Array = np.concatenate([np.empty(0, self.dtype), *parts])
        if found.size and found.max() >= len(self.byte_table):
            raise DataError(
                f"{self.label} has the token id {found.max()}, beyond the {len(self.byte_table)} "
                "of its tokenizer; delete its folder and prepare the corpus again"
            )
        return found


class ShardWriter:
    """Writes tokens to `PREFIX-00000.bin`, `PREFIX-00001.bin`, … of at most `limit` tokens each.

    Args:
        folder: Where to.
        prefix: The side of the split.
        dtype: The type on disk.
        limit: Tokens in a shard at most.
        state: What `state` returned, to go on from there; the files must end where it says.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        dtype: np.dtype[Any],
        limit: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._prefix = folder, prefix
        self._dtype, self._limit = dtype, limit
        self.documents: int = state["documents"] if state else 0
        self._shards: list[dict[str, Any]] = [dict(x) for x in state["shards"]] if state else []
        self._handle: IO[bytes] | None = None
        self._hash = sha256()
        if self._shards and self._shards[-1]["tokens"] < limit:
            path = folder / self._shards[-1]["file"]
            with path.open("rb") as handle:
                self._hash = file_digest(handle, "sha256")
            self._handle = path.open("ab")

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard["tokens"] for shard in self._shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of text that they stand for."""
        return sum(shard["text_bytes"] for shard in self._shards)

    def write(self, ids: Array, text_bytes: npt.NDArray[np.int64]) -> None:
        """Append tokens, and the bytes of text that each stands for (both of shape (tokens,))."""
        while ids.size:
            if self._handle is None:
                self._open()
            shard = self._shards[-1]
            room = self._limit - shard["tokens"]
            content = ids[:room].astype(self._dtype).tobytes()
            assert self._handle is not None
            self._handle.write(content)
            self._hash.update(content)
            shard["tokens"] += len(ids[:room])
            shard["text_bytes"] += int(text_bytes[:room].sum())
            ids, text_bytes = ids[room:], text_bytes[room:]
            if shard["tokens"] == self._limit:
                self._close()

    def state(self) -> dict[str, Any]:
        """Flush everything to the disk; what a new writer needs to go on."""
        if self._handle is not None:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._shards[-1]["sha256"] = self._hash.hexdigest()
        return {"documents": self.documents, "shards": [dict(shard) for shard in self._shards]}

    def finish(self) -> dict[str, Any]:
        """Flush everything to the disk and return this side's part of the manifest."""
        self._close()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "shards": self._shards,
        }

    def abandon(self) -> None:
        """Close the open file without finishing it."""
        if self._handle is not None:
            with contextlib.suppress(OSError):  # a full disk: what is in the buffer is lost
                self._handle.close()

    def _open(self) -> None:
        name = f"{self._prefix}-{len(self._shards):05d}.bin"
        self._handle = (self._folder / name).open("wb")
        self._hash = sha256()
        self._shards.append({"file": name, "tokens": 0, "text_bytes": 0, "sha256": ""})

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            self._handle = None
            self._shards[-1]["sha256"] = self._hash.hexdigest()


def check_shards(
    folder: Path, shards: Sequence[dict[str, Any]], dtype: np.dtype[Any], *, hashes: bool
) -> Iterator[Path]:
    """The shards' paths, each once it was found to have the size (and hash) of the manifest.

    Raises `DataError` naming the shard that is missing, truncated or corrupt.
    """
    for shard in shards:
        path = inside(folder, str(shard["file"]), error=DataError)
        expected = int(shard["tokens"]) * dtype.itemsize
        try:
            size = path.stat().st_size
            if size != expected:
                raise DataError(
                    f"token shard {path} is truncated or corrupt: {size} bytes where the manifest "
                    f"says {expected}; delete its folder and prepare the corpus again"
                )
            if hashes and sha256_of(path) != shard["sha256"]:
                raise DataError(
                    f"token shard {path} is corrupt: its SHA-256 is not the manifest's; delete "
                    "its folder and prepare the corpus again"
                )
        except OSError as problem:
            raise DataError(
                f"cannot read token shard {path}: {problem.strerror}; delete its folder and "
                "prepare the corpus again"
            ) from problem
        yield path
