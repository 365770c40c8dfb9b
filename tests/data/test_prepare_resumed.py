"""Killed, corrupted, in one process or in several: the same bytes, and nothing done twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hub_copies
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyak.data import encode, journal
from polyak.data.prepare import Done, open_prepared, prepare
from polyak.errors import DataError

# Prepares a corpus in small chunks and writes down every one; tells how far it has come.
_STEPWISE = """
import pathlib, sys, time
from polyak.data import encode
from polyak.data.prepare import prepare
corpus, tokenizer, cache, workers, chunk = sys.argv[1:]
encode.CHUNK = int(chunk)
def tell(done):
    print(done.text_bytes, done.found_bytes, flush=True)
    time.sleep(0.01)
prepare(
    corpus, tokenizer, cache=pathlib.Path(cache), workers=int(workers), shard_tokens=7000,
    save_seconds=0, progress=tell,
)
"""


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with JSONL, Parquet and text, 250 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "isn't",
        "naïve:",
        "数学,",
        "1234",
        "“times”",
        "5678\n\n",
        "and\tso",
        "on",
    ]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 60))) for _ in range(1200)]
    records = [json.dumps({"text": text}) for text in texts[:500]]
    (folder / "a.jsonl").write_text("\n".join(records) + "\n")
    (folder / "m.txt").write_text(" ".join(texts[500:800]))  # one long document
    (folder / "n.txt").write_text("")
    pq.write_table(pa.table({"text": texts[800:]}), folder / "z.parquet", row_group_size=70)
    return folder


def _contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def _only_folder(cache: Path) -> Path:
    (folder,) = (cache / "prepared").iterdir()
    return folder


def _start(corpus: object, tokenizer: str, cache: Path, workers: int) -> subprocess.Popen[str]:
    chunk = 4000 if isinstance(corpus, Path) else 300  # the hub's copies are small
    words = [str(corpus), tokenizer, str(cache), str(workers), str(chunk)]
    return subprocess.Popen(
        [sys.executable, "-c", _STEPWISE, *words], stdout=subprocess.PIPE, text=True
    )


def _finish(corpus: object, tokenizer: str, cache: Path, workers: int = 1) -> Done:
    """Prepare in this process, from wherever it was left; the last progress."""
    seen: list[Done] = []
    keywords = {"shard_tokens": 7000, "workers": workers, "progress": seen.append}
    prepare(str(corpus), tokenizer, cache=cache, **keywords)
    return seen[-1]


def _killed_until_done(
    corpus: object, tokenizer: str, cache: Path, *, kills: int, seed: int
) -> list[int]:
    """Kill a preparation so often in its middle, then let it finish; where each start began."""
    draw = random.Random(seed)
    begun = []
    for _ in range(kills):
        with _start(corpus, tokenizer, cache, draw.choice([1, 2])) as process:
            assert process.stdout is not None
            for _ in range(draw.randrange(1, 9)):
                line = process.stdout.readline()
                assert line, "it was done before it could be killed"
            process.send_signal(signal.SIGKILL)
            begun.append(int(line.split()[1]))
    begun.append(_finish(corpus, tokenizer, cache, 2).found_bytes)
    return begun


def test_the_number_of_processes_changes_no_byte(corpus: Path, tmp_path: Path) -> None:
    found = {}
    for workers in (None, 1, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode, "CHUNK", 3000 * (workers or 1))  # nor does the chunk
            cache = tmp_path / str(workers)
            prepare(str(corpus), "bpe-300", cache=cache, workers=workers, shard_tokens=5000)
        found[workers] = _contents(_only_folder(cache))
    assert len({json.dumps(contents) for contents in found.values()}) == 1


@pytest.mark.parametrize("tokenizer", [pytest.param("bytes", marks=slow), "bpe-300"])
def test_killed_four_times_it_goes_on_and_the_result_is_the_same(
    corpus: Path, tmp_path: Path, tokenizer: str
) -> None:
    whole = _finish(corpus, tokenizer, tmp_path / "whole")
    begun = _killed_until_done(corpus, tokenizer, tmp_path / "killed", kills=4, seed=0)
    assert begun == sorted(begun)
    assert 0 == begun[0] < begun[2] < begun[-1] < whole.text_bytes
    folders = [_only_folder(tmp_path / name) for name in ("whole", "killed")]
    assert folders[0].name == folders[1].name
    assert _contents(folders[0]) == _contents(folders[1])
    assert "journal.jsonl" not in _contents(folders[1])
    open_prepared(folders[1])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tinystories", marks=slow),
        "wikitext-103",
        pytest.param("openwebtext", marks=slow),
    ],
)
def test_streams_of_the_hub_go_on_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("POLYAK_HUB", str(hub_copies.write(tmp_path / "hub")))
    _finish(name, "bytes", tmp_path / "whole")
    _killed_until_done(name, "bytes", tmp_path / "killed", kills=1, seed=3)
    folders = [_only_folder(tmp_path / name) for name in ("whole", "killed")]
    assert _contents(folders[0]) == _contents(folders[1])


@pytest.mark.slow
def test_killed_forty_times_at_any_moment(corpus: Path, tmp_path: Path) -> None:
    draw = random.Random(5)
    _finish(corpus, "bpe-300", tmp_path / "whole")
    cache = tmp_path / "killed"
    for _ in range(40):  # also while it starts, trains the tokenizer, resumes and finishes
        process = _start(corpus, "bpe-300", cache, draw.choice([1, 2, 3]))
        try:
            process.wait(timeout=draw.uniform(0.1, 1.2))
        except subprocess.TimeoutExpired:
            process.kill()
        with process:
            process.communicate()
    prepare(str(corpus), "bpe-300", cache=cache, shard_tokens=7000)  # if it was not finished
    assert _contents(_only_folder(tmp_path / "whole")) == _contents(_only_folder(cache))


# --- what is left can be damaged ----------------------------------------------------------------


@pytest.fixture(scope="module")
def left(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a preparation that was killed in the middle."""
    cache = tmp_path_factory.mktemp("left")
    with _start(corpus, "bytes", cache, 1) as process:
        assert process.stdout is not None
        for _ in range(12):
            process.stdout.readline()
        process.kill()
    return cache


def _partial(cache: Path) -> Path:
    (folder,) = (path for path in (cache / "prepared").glob(".partial-*") if path.is_dir())
    return folder


def _places(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / journal.NAME).read_text().splitlines()[1:]
    return [json.loads(line.partition(" ")[2]) for line in lines if line.endswith("}")]


def test_a_damaged_shard_is_noticed_and_done_again_from_there(
    corpus: Path, left: Path, tmp_path: Path
) -> None:
    _finish(corpus, "bytes", tmp_path / "whole")
    expected = _contents(_only_folder(tmp_path / "whole"))

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def tear(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-30])

    damages = {
        "flip the second": ("train-00001.bin", flip),
        "flip the first": ("train-00000.bin", flip),
        "remove": ("train-00001.bin", Path.unlink),
        "tear the journal": (journal.NAME, tear),
        "flip the journal": (journal.NAME, flip),
        "remove the journal": (journal.NAME, Path.unlink),
    }
    for number, (what, (name, damage)) in enumerate(damages.items()):
        cache = tmp_path / str(number)
        shutil.copytree(left, cache)
        folder = _partial(cache)
        places = _places(folder)
        done = sum(
            shard["text_bytes"] for side in places[-1]["sides"].values() for shard in side["shards"]
        )
        damage(folder / name)
        found_bytes = _finish(corpus, "bytes", cache).found_bytes
        assert found_bytes <= done, what
        if name == "train-00001.bin":
            assert found_bytes > 0, what  # what lies before the damage is kept
        if what in ("flip the first", "remove the journal"):
            assert found_bytes == 0, what
        assert _contents(_only_folder(cache)) == expected, what


def test_what_was_written_after_the_last_place_is_cut_off(
    corpus: Path, left: Path, tmp_path: Path
) -> None:
    _finish(corpus, "bytes", tmp_path / "whole")
    shutil.copytree(left, tmp_path / "cache")
    folder = _partial(tmp_path / "cache")
    for path in folder.glob("*.bin"):
        with path.open("ab") as handle:
            handle.write(b"half a chunk")
    (folder / "train-00077.bin").write_bytes(b"a shard too many")
    assert _finish(corpus, "bytes", tmp_path / "cache").found_bytes > 0
    folders = [_only_folder(tmp_path / name) for name in ("whole", "cache")]
    assert _contents(folders[0]) == _contents(folders[1])


def test_a_bad_record_leaves_nothing_even_if_much_was_done(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) for number in range(2000)]
    path.write_text("\n".join([*lines, '{"body": "x"}']))
    for split in (1, 2):  # the second looks for near-duplicates first, and finds it then
        done: list[Done] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode, "CHUNK", 1000)
            keywords = {"workers": 2, "save_seconds": 0, "progress": done.append}
            with pytest.raises(DataError, match="line 2001: no field"):
                prepare(str(path), cache=tmp_path / "cache", split=split, **keywords)
        assert len(done) > 10 or split == 2
        assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_an_interruption_keeps_what_is_done(corpus: Path, tmp_path: Path) -> None:
    def interrupt(done: Done) -> None:
        if done.text_bytes > 100_000:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "CHUNK", 4000)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(corpus), cache=tmp_path, workers=2, save_seconds=0, progress=interrupt)
    seen: list[Done] = []
    prepare(str(corpus), cache=tmp_path, progress=seen.append)
    assert seen[-1].found_bytes > 90_000


def test_a_dead_worker_is_one_line_and_the_work_goes_on_later(corpus: Path, tmp_path: Path) -> None:
    def kill_workers(done: Done) -> None:
        if done.text_bytes > 50_000:
            for child in _children(os.getpid()):
                os.kill(child, signal.SIGKILL)

    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "CHUNK", 4000)
        with pytest.raises(DataError, match=r"a worker process was killed by signal 9 \(out of"):
            prepare(str(corpus), cache=tmp_path, workers=2, save_seconds=0, progress=kill_workers)
    seen: list[Done] = []
    prepare(str(corpus), cache=tmp_path, progress=seen.append)
    assert seen[-1].found_bytes >= 45_000


def test_workers_end_with_the_process_that_started_them(corpus: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    with _start(corpus, "bytes", tmp_path, 2) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = _children(process.pid)
        assert len(children) == 2
        process.kill()
    for _ in range(100):
        alive = [child for child in children if Path(f"/proc/{child}").exists()]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(alive)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found
