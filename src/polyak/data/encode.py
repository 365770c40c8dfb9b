"""Encoding a corpus in chunks, in this process or in several, with the same result in order."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polyak.checks import check_whole
from polyak.data.documents import Reader
from polyak.data.split import Splitter
from polyak.data.tokenizers import ByteTokenizer, Tokenizer, utf8
from polyak.errors import DataError

# Characters that are encoded together. Too small for memory to matter, and large enough that
# handing a chunk to another process costs nothing beside encoding it.
CHUNK = 1 << 20

# Chunks that are encoded in this process before others are started: a small corpus is done by then.
_WARM_UP = 3

Arrays = list[npt.NDArray[Any]]


class Part(NamedTuple):
    """A piece of a document, on one side of the split."""

    side: int
    last: bool  # whether the document ends here on that side
    text: str


@dataclass
class Chunk:
    """Some consecutive parts of a corpus, and where to go on after them.

    Attributes:
        parts: The parts.
        documents: How many documents begin on each side.
        empty: How many empty documents are among them.
        place: (`Reader` position, parts to skip in its first document).
    """

    parts: list[Part] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    empty: int = 0
    place: tuple[Any, int] = (None, 0)


def chunks(
    reader: Reader, splitter: Splitter, tokenizer: Tokenizer, skip: int = 0
) -> Iterator[Chunk]:
    """The rest of a corpus in chunks of about `CHUNK` characters.

    Args:
        reader: Where the documents come from.
        splitter: Which side they go to.
        tokenizer: Cuts long texts into pieces.
        skip: Parts of the first document that are done already.
    """
    sides = len(splitter.sides)
    chunk, size = Chunk(documents=[0] * sides), 0
    for document in reader:
        if not document.text:
            chunk.empty += 1
        done = 0  # parts of this document
        for side, whole in enumerate(splitter.divide(document)):
            first = True
            for text, last in _flag_last(tokenizer.pieces("" if whole is None else whole)):
                if size >= CHUNK and reader.before() is not None:
                    chunk.place = (reader.before(), done)
                    yield chunk
                    chunk, size = Chunk(documents=[0] * sides), 0
                done += 1
                if skip:
                    skip -= 1
                else:
                    chunk.parts.append(Part(side, last, text))
                    chunk.documents[side] += first
                    size += len(text)
                first = False
        skip = 0
        if size >= CHUNK:
            chunk.place = (reader.position(), 0)
            yield chunk
            chunk, size = Chunk(documents=[0] * sides), 0
    chunk.place = (reader.position(), 0)
    yield chunk


def encode(tokenizer: Tokenizer, parts: Sequence[Part], sides: int) -> Arrays:
    """The ids of each side, in the tokenizer's type, with an end of text after every document."""
    encoded = tokenizer.encode_many([part.text for part in parts])
    end = np.array([tokenizer.end_of_text])
    found: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(sides)]
    for part, ids in zip(parts, encoded, strict=True):
        found[part.side] += [ids, end] if part.last else [ids]
    none = np.empty(0, np.int64)
    return [np.concatenate([none, *ids]).astype(tokenizer.dtype) for ids in found]


class Encoder:
    """Encodes chunks in order, in `workers` processes of their own or in this one.

    The processes hold the tokenizer and a chunk each; at most two more chunks per process wait.
    They end with the `with` block, and also when this process is killed.

    Args:
        tokenizer: What encodes.
        folder: Where `tokenizer.save` has written it.
        sides: Number of sides of the split.
        workers: Processes; 1 is this one; None: one per core, once it is worth starting them.
    """

    def __init__(
        self, tokenizer: Tokenizer, folder: Path, sides: int, workers: int | None = None
    ) -> None:
        check_whole("workers", workers, optional=True)
        self._tokenizer, self._folder, self._sides = tokenizer, folder, sides
        self._warm_up = 0 if workers else _WARM_UP
        if workers is None:  # bytes are encoded as fast as they are handed to another process
            workers = 1 if isinstance(tokenizer, ByteTokenizer) else available_cores()
        self.workers = workers
        self._idle: list[_Worker] = []
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._idle:
            worker.stop()  # before waiting for the threads that wait for them
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, given: Iterable[Chunk]) -> Iterator[tuple[Chunk, Arrays]]:
        """Each chunk with the ids of each side, in the order given."""
        waiting: deque[tuple[Chunk, Future[Arrays]]] = deque()
        for number, chunk in enumerate(given):
            if self.workers == 1 or number < self._warm_up:
                yield chunk, encode(self._tokenizer, chunk.parts, self._sides)
                continue
            if self._pool is None:
                self._start()
            assert self._pool is not None
            waiting.append((chunk, self._pool.submit(self._elsewhere, chunk)))
            while waiting and (len(waiting) > 2 * self.workers or waiting[0][1].done()):
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()

    def _start(self) -> None:
        try:
            for _ in range(self.workers):
                self._idle.append(_Worker(self._folder, self._sides))
        except OSError as problem:
            raise DataError(
                f"cannot start {self.workers} worker processes: {problem.strerror or problem}; "
                "use fewer workers"
            ) from problem
        self._free = deque(self._idle)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="polyak-encode")

    def _elsewhere(self, chunk: Chunk) -> Arrays:
        worker = self._free.popleft()  # as many as threads: there is always one
        try:
            return worker.encode(chunk.parts)
        finally:
            self._free.append(worker)


class _Worker:
    """A process that encodes what it is sent; see `polyak.data.worker`."""

    def __init__(self, folder: Path, sides: int) -> None:
        places = os.pathsep.join(place for place in sys.path if place)
        # -P: nothing in the current folder is taken for a module.
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c", "from polyak.data.worker import main; main()"),
                *(str(folder), str(sides)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": places, "TOKENIZERS_PARALLELISM": "false"},
        )

    def encode(self, parts: Sequence[Part]) -> Arrays:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for part in parts:
            utf8(part.text)
        try:
            send(self._process.stdin, parts)
            found: Arrays = pickle.load(self._process.stdout)
            return found
        except (EOFError, OSError, pickle.UnpicklingError) as problem:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise DataError(
                f"a worker process {how} (out of memory?); repeat the command, with fewer workers, "
                "to go on"
            ) from problem

    def stop(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # what it did not read any more
                continue
        self._process.wait()


def send(stream: IO[bytes], value: Any) -> None:
    """Pickle between this process and a worker of its own; nothing that comes with data."""
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _flag_last(parts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    current = next(parts, None)
    while current is not None:
        following = next(parts, None)
        yield current, following is None
        current = following
