"""Memory stays the same however large the corpus: measured as the peak of a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyak.data import documents, readers
from polyak.data.corpora import load_corpus
from polyak.data.documents import LongText
from polyak.data.prepare import prepare

_PEAK = r"""
import pathlib, re, resource, sys
from polyak.data.prepare import prepare
prepare(sys.argv[1], sys.argv[2], cache=pathlib.Path(sys.argv[3]), workers=int(sys.argv[4]))
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss is inherited by exec
print(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""

_LINE = "The quick brown fox jumps over the lazy dog, naïve as ever, number {}.\n"


def _peaks(corpus: Path, cache: Path, tokenizer: str, workers: int) -> tuple[int, int]:
    """Megabytes at most, of the process itself and of its largest worker."""
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, str(corpus), tokenizer, str(cache), str(workers)],
        capture_output=True,
        text=True,
        check=True,
    )
    own, worker = map(int, result.stdout.split())
    return own, worker


def _write(path: Path, megabytes: int) -> Path:
    texts = [_LINE.format(number) * 20 for number in range(megabytes * 660)]
    if path.suffix == ".txt":
        path.write_text("".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pq.write_table(pa.table({"text": texts}), path)
    return path


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize(
    "kind", ["txt", *(pytest.param(k, marks=pytest.mark.slow) for k in ("jsonl", "parquet"))]
)
def test_peak_memory_does_not_grow_with_the_corpus(tmp_path: Path, kind: str) -> None:
    peaks = []
    for megabytes in (18, 54):  # a text file of this size is one document
        corpus = _write(tmp_path / f"{megabytes}.{kind}", megabytes)
        assert corpus.stat().st_size > megabytes * 800_000 or kind == "parquet"
        peaks.append(_peaks(corpus, tmp_path / str(megabytes), "bytes", 1)[0])
    assert peaks[1] < peaks[0] + 15, peaks
    assert peaks[1] < 260, peaks


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_peak_memory_stays_with_bpe_and_workers(tmp_path: Path, kind: str) -> None:
    peaks = []
    for megabytes in (20, 60):
        corpus = _write(tmp_path / f"{megabytes}.{kind}", megabytes)
        peaks.append(_peaks(corpus, tmp_path / str(megabytes), "bpe-300", 2))
    for before, after in zip(*peaks, strict=True):
        assert after < before * 1.2 + 20, peaks


def test_a_long_file_has_the_tokens_of_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is read: whole, or piece by piece."""
    text = "\ufeff" + "".join(_LINE.format(number) for number in range(3000))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "novel.txt").write_text(text, encoding="utf-8")
    (tmp_path / "two").mkdir()
    for number in range(9):
        (tmp_path / "two" / f"{number}.txt").write_text(f"{number} {text[number:]}")
    for corpus in ("one", "two"):
        for tokenizer in ("bytes", "bpe-300"):
            whole = prepare(str(tmp_path / corpus), tokenizer, cache=tmp_path / "whole")
            with monkeypatch.context() as patch:
                patch.setattr(readers, "LONG_FILE", 1000)
                patch.setattr(documents, "_READ", 777)
                first = next(iter(load_corpus(str(tmp_path / corpus)).documents)).text
                assert isinstance(first, LongText)
                pieces = prepare(str(tmp_path / corpus), tokenizer, cache=tmp_path / "pieces")
            assert pieces.fingerprint == whole.fingerprint
            assert (pieces.train[:] == whole.train[:]).all()
            assert (pieces.validation[:] == whole.validation[:]).all()


def test_a_long_text_is_cut_at_any_character(tmp_path: Path) -> None:
    text = "naïve 数学 “x” " * 200_000
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    long = LongText(path)
    assert len(long) == len(text)
    for cut in (0, 1, 700_001, 1_048_576, len(text) - 1, len(text)):
        before, after = long.cut(cut)
        assert ("".join(before), "".join(after)) == (text[:cut], text[cut:])
