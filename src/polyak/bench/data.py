"""How fast a corpus is prepared, beside the usual ways: `polyak prepare --bench`."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from polyak import formats
from polyak.data.corpora import load_corpus
from polyak.data.documents import parts_of
from polyak.data.encode import available_cores
from polyak.data.prepare import open_prepared, prepare
from polyak.data.tokenizers import Tokenizer
from polyak.errors import DataError, MissingExtraError
from polyak.statistics.intervals import spread


def compare(
    corpus: str,
    tokenizer: str,
    *,
    text_field: str = "text",
    encoding: str = "utf-8",
    cache: Path | None = None,
    workers: int | None = None,
    rounds: int = 3,
) -> dict[str, Any]:
    """MB/s of `prepare` with one and with several processes, of a plain loop and `datasets.map`.

    The corpus is prepared once before (that trains `bpe-N`), and its documents are held in
    memory for the plain loop and `datasets.map`, which have to tokenise and to write ids, while
    `prepare` also reads the corpus, splits it, hashes what it writes and flushes it to the disk.
    `datasets.map` is left out where `datasets` is not installed.

    Args:
        corpus: see `load_corpus`; it must fit in memory.
        tokenizer: see `prepare`.
        text_field: see `prepare`.
        encoding: see `prepare`.
        cache: where the corpus is prepared before the timing.
        workers: processes; one per core if None.
        rounds: every round times every way once, in the same order.

    Raises:
        What `prepare` raises.
    """
    workers = available_cores() if workers is None else workers
    before = prepare(corpus, tokenizer, text_field=text_field, encoding=encoding, cache=cache)
    loaded = load_corpus(corpus, text_field=text_field, encoding=encoding)
    texts = ["".join(parts_of(document.text)) for document in loaded.documents]
    megabytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    made = before.tokenizer

    def ours(processes: int) -> Callable[[Path], None]:
        def run(folder: Path) -> None:
            # the tokenizer by path: training it is not what is timed
            prepare(
                *(corpus, str(before.folder)),
                text_field=text_field,
                encoding=encoding,
                cache=folder,
                workers=processes,
            )

        return run

    ways: dict[str, Callable[[Path], None]] = {
        "plain loop, 1 process": lambda folder: _plain_loop(texts, made, folder)
    }
    with _sequential_tokenizers():
        for processes in sorted({1, workers}):
            try:
                mapped = _datasets_map(texts, made, processes)
            except MissingExtraError:
                continue
            ways[f"datasets.map, {_count(processes)}"] = mapped
        for processes in sorted({1, workers}):
            ways[f"polyak prepare, {_count(processes)}"] = ours(processes)
        load = _load()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                with tempfile.TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    run(Path(folder))
                    seconds[name].append(time.perf_counter() - start)
                    if name.startswith("polyak"):
                        _check_same(Path(folder), before.manifest)
    speeds = {name: [megabytes / value for value in taken] for name, taken in seconds.items()}
    first = statistics.median(speeds["plain loop, 1 process"])
    return {
        "format": formats.current("prepare bench"),
        "kind": "prepare bench",
        "corpus": corpus,
        "tokenizer": made.name,
        "documents": len(texts),
        "megabytes": megabytes,
        "rounds": rounds,
        "load_before": load,
        "load_after": _load(),
        "cores": available_cores(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "ways": [
            {
                "name": name,
                "megabytes_per_second": spread(values),
                "relative_speed": statistics.median(values) / first,
            }
            for name, values in speeds.items()
        ],
    }


def _plain_loop(texts: list[str], tokenizer: Tokenizer, folder: Path) -> None:
    """What a training script does: one document after the other, into one array, into a file."""
    encode = _hugging_face(tokenizer)
    ids: list[int] = []
    for text in texts:
        ids.extend(encode.encode(text).ids)
        ids.append(tokenizer.end_of_text)
    np.array(ids, dtype=tokenizer.dtype).tofile(folder / "train.bin")


def _datasets_map(texts: list[str], tokenizer: Tokenizer, processes: int) -> Callable[[Path], None]:
    """`datasets.Dataset.map` in batches of 1,000 documents, its ids written to one file."""
    try:
        import datasets
    except ImportError as problem:
        raise MissingExtraError("datasets is not installed") from problem
    datasets.disable_progress_bars()
    encode, end = _hugging_face(tokenizer), tokenizer.end_of_text

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [[*found.ids, end] for found in encode.encode_batch(batch["text"])]}

    def run(folder: Path) -> None:
        source = datasets.Dataset.from_dict({"text": texts})
        mapped = source.map(
            tokenise,
            batched=True,
            num_proc=processes if processes > 1 else None,
            remove_columns=["text"],
            new_fingerprint=f"bench-{time.monotonic_ns()}",
        )
        with (folder / "train.bin").open("wb") as handle:
            for batch in mapped.with_format("arrow").iter(batch_size=1000):
                found = batch["ids"].combine_chunks().flatten().to_numpy()
                found.astype(tokenizer.dtype).tofile(handle)

    return run


def _hugging_face(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    return HuggingFaceTokenizer.from_str(tokenizer.hugging_face_json())


def _check_same(cache: Path, manifest: dict[str, Any]) -> None:
    """What was timed must be what had been prepared."""
    (folder,) = (path for path in (cache / "prepared").iterdir() if path.name[0] != ".")
    found = open_prepared(folder, verify=False).manifest
    if any(found[side] != manifest[side] for side in ("train", "validation")):
        raise DataError(f"preparing the corpus again gave other tokens than {manifest['corpus']}")


@contextmanager
def _sequential_tokenizers() -> Iterator[None]:
    """One thread per process, so that a process is a core; also what forking needs."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _load() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _count(processes: int) -> str:
    return f"{processes} process" + ("es" if processes > 1 else "")
