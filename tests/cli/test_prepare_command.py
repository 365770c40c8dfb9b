"""`polyak prepare`: what it prints, resumes, checks and refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from tiny_runs import answer, polyak

from polyak.cli.prepare import progress_line
from polyak.data.prepare import Done, open_prepared, prepare


def test_it_prints_what_was_made_and_finds_it_again(corpus: Path, tmp_path: Path) -> None:
    words = ("prepare", corpus, "--tokenizer", "bpe-270", "--validation-fraction", "0.2")
    first = answer(*words, cwd=tmp_path, cache=tmp_path / "cache")
    assert (first.returncode, first.stderr) == (0, "")
    shown = dict(re.split(r" {2,}", line, maxsplit=1) for line in first.stdout.splitlines())
    names = ["corpus", "tokenizer", "documents", "tokens", "bytes", "speed"]
    assert list(shown) == [*names, "fingerprint", "folder"]
    prepared = open_prepared(Path(shown["folder"]))
    assert shown["fingerprint"] == prepared.fingerprint
    assert shown["tokenizer"] == "bpe-270, 270 tokens"
    lengths = (len(prepared.train), len(prepared.validation))
    assert shown["tokens"] == "train {:,}, validation {:,}".format(*lengths)
    assert re.fullmatch(r"[\d.,]+ MB/s \([\d.,]+ s\)", shown["speed"])
    again = answer(*words, cwd=tmp_path, cache=tmp_path / "cache")
    assert "prepared before; every shard matches its SHA-256" in again.stdout
    assert f"fingerprint  {prepared.fingerprint}\n" in again.stdout


def test_interrupted_it_says_where_it_went_on(tmp_path: Path) -> None:
    records = [{"text": f"{number} quick brown foxes\n" * 90} for number in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def interrupt(done: Done) -> None:
        if done.text_bytes > 2_000_000:
            raise KeyboardInterrupt

    cache = tmp_path / "here"
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tmp_path / "a.jsonl"), cache=cache, save_seconds=0, progress=interrupt)
    asked = ("prepare", "a.jsonl", "--cache", "here")
    elsewhere = {"cwd": tmp_path, "cache": tmp_path / "not-this"}
    missing = answer(*asked, "--verify", **elsewhere)
    assert missing.returncode == 1
    assert "is only partly prepared in here" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
    done = answer(*asked, **elsewhere)
    assert re.search(r"MB/s .*, going on after \d\.\d MB done before\n", done.stdout), done.stderr
    assert "every shard matches its SHA-256" in answer(*asked, "--verify", **elsewhere).stdout
    assert not (tmp_path / "not-this").exists()
    shard = next((tmp_path / "here").glob("prepared/a.jsonl-*/train-00000.bin"))
    os.truncate(shard, 10)
    bad = answer(*asked, "--verify", **elsewhere)
    assert bad.returncode == 1
    assert "train-00000.bin is truncated or corrupt" in bad.stderr
    mended = answer(*asked, **elsewhere)
    assert mended.returncode == 0
    assert re.match(r"polyak prepare: warning: .*; preparing 'a.jsonl' again\n$", mended.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tinystorie"], "unknown corpus 'tinystorie'; did you mean 'tinystories'?"),
        (["c4[document=3]"], "unknown option of corpus 'c4' 'document'; did you mean 'documents'?"),
        (["corpus.txt", "--tokenizer", "gpt-2"], "unknown tokenizer 'gpt-2'; did you mean 'gpt2'?"),
        (["corpus.txt", "--tokenizer", "bpe-9"], "'bpe-9' is too small: BPE needs at least 257"),
        (["corpus.txt", "--tokeniser", "bytes"], "did you mean --tokenizer?"),
        (["corpus.txt", "--workers", "0"], "workers=0 must be a whole number of at least 1"),
        (
            ["corpus.txt", "--shard-tokens", "0"],
            "shard_tokens=0 must be a whole number of at least 1",
        ),
        (["corpus.txt", "--validation-fraction", "2"], "validation_fraction=2.0 must lie strictly"),
        (["corpus.txt", "--verify", "--bench"], "--verify and --bench exclude each other"),
        (["corpus.txt", "--out", "x"], "--out is for --bench"),
        (["corpus.txt", "--verify"], "corpus 'corpus.txt' with tokenizer 'bytes' is not prepared"),
        (
            ["tinystories-own", "--validation-fraction", "0.1"],
            "'tinystories-own' has a split of its own",
        ),
        (["lambada", "--tokenizer", "bpe-300"], "is for evaluation and has no training side"),
        (["lambada"], "$POLYAK_HUB is nowhere, but it holds no folder EleutherAI/lambada_openai"),
        ([], "CORPUS"),
    ],
)
def test_mistakes_are_one_line(
    corpus: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    hub = {"POLYAK_HUB": "nowhere"} if words == ["lambada"] else {}
    found = answer("prepare", *words, cwd=corpus.parent, cache=tmp_path / "cache", **hub)
    assert found.returncode in (1, 2)
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("polyak prepare: ")
    assert message in found.stderr
    assert not (tmp_path / "cache").exists()


def test_bench_compares_with_a_plain_loop_and_with_datasets(corpus: Path, tmp_path: Path) -> None:
    words = ("--tokenizer", "bpe-270", "--workers", "2", "--rounds", "2", "--bench")
    found = polyak("prepare", corpus, *words, "--out", "bench", cwd=tmp_path, cache=tmp_path / "c")
    assert found.returncode == 0, found.stderr
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    ways = {row["name"]: row for row in results["ways"]}
    assert list(ways) == [
        "plain loop, 1 process",
        "datasets.map, 1 process",
        "datasets.map, 2 processes",
        "polyak prepare, 1 process",
        "polyak prepare, 2 processes",
    ]
    assert ways["plain loop, 1 process"]["relative_speed"] == 1
    assert all(row["megabytes_per_second"]["low"] > 0 for row in ways.values())
    assert results["megabytes"] * 1e6 == corpus.stat().st_size
    for name in ways:
        assert name in found.stdout


def test_progress_tells_the_share_and_the_time_left_where_the_size_is_known() -> None:
    known = Done(10, 25_000_000, 9_000, found_bytes=5_000_000, all_bytes=45_000_000)
    said = "56% of 45.0 MB, 10 documents, 2.00 MB/s, about 10 s left"
    assert progress_line(known, 10.0) == said  # what was done before took none of this time
    done = known._replace(text_bytes=45_000_000)
    assert progress_line(done, 20.0) == "100% of 45.0 MB, 10 documents, 2.00 MB/s"
    unknown = known._replace(all_bytes=None)
    assert progress_line(unknown, 10.0) == "10 documents, 25.0 MB, 9,000 tokens, 2.00 MB/s"
