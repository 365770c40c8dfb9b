"""`polyak evaluate` and `polyak forgetting`: what they print, and one line for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import answer, run_config

from polyak.cli.main import main
from polyak.training.loop import train

Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("run") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder.parent / "cache"))
        train(run_config(corpus, steps=4), folder)
    return folder


def test_a_run_is_evaluated_and_the_page_is_named(
    run: Path, tmp_path: Path, capsys: Streams
) -> None:
    out = tmp_path / "out"
    words = ["--tokens", "256", "--attention-entropy", "--stride", "4", "--device", "cpu"]
    assert main(["evaluate", str(run), *words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    one_line = " ".join(said.split())
    assert "corpus.txt, validation: 256 tokens (16 blocks of 16, stride 4; 1 document)" in one_line
    assert "Attention entropy of mine" in said
    assert said.splitlines()[-1] == f"Report: {out / 'report.html'}"
    results = json.loads((out / "results.json").read_text())
    assert results["runs"][0]["corpora"][0]["stride"] == 4
    assert results["command"].startswith("polyak evaluate ")


def test_forgetting_goes_on_where_it_was(
    run: Path, tmp_path: Path, corpus: Path, capsys: Streams
) -> None:
    words = ["forgetting", str(run), "--onto", str(corpus), "--steps", "4", "--warmup", "1"]
    words += ["--eval-tokens", "64", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "4 steps of adamw on" in first
    assert main(words) == 0
    assert capsys.readouterr().out == first


def test_bad_input_is_one_line_and_leaves_no_folder(
    run: Path, tmp_path: Path, capsys: Streams
) -> None:
    corrupt = tmp_path / "corrupt"
    shutil.copytree(run, corrupt)
    (corrupt / "model" / "model.safetensors").write_bytes(b"nothing")
    gone = tmp_path / "gone"
    shutil.copytree(run, gone)
    (gone / "model" / "model.safetensors").unlink()
    seeing = tmp_path / "seeing"
    shutil.copytree(run, seeing)
    config = seeing / "model" / "config.json"
    config.write_text(config.read_text().replace('"causal": true', '"causal": false'))
    (tmp_path / "empty.txt").write_text("")
    empty = str(tmp_path / "empty.txt")
    onto = ["--onto", "stdlib"]
    for words, says in (
        (["evaluate"], "no run is named"),
        (["evaluate", str(tmp_path / "none")], "does not exist"),
        (["evaluate", str(corrupt)], "is not the file that was written"),
        (["evaluate", str(gone)], "cannot be loaded"),
        (["evaluate", str(seeing)], "seeing is not causal"),
        (["evaluate", str(run), "--tokens", "0"], "tokens=0"),
        (["evaluate", str(run), "--tokens", "5"], "tokens=5 is less than one block"),
        (["evaluate", str(run), "--stride", "99"], "stride=99 must be from 1 to 16"),
        (["evaluate", str(run), "--corpora", "stdlob"], "did you mean 'stdlib'"),
        (["evaluate", str(run), "--corpora", empty], "empty"),
        (["evaluate", str(run), "--split", "test"], "has no test side"),
        (["forgetting", str(run)], "no corpus is named"),
        (["forgetting", *onto], "no run is named"),
        (["forgetting", str(corrupt), *onto], "is not the file that was written"),
        (["forgetting", str(seeing), *onto], "seeing is not causal"),
        (["forgetting", str(run), *onto, "--steps", "0"], "steps=0"),
        (["forgetting", str(run), *onto, "--steps", "9"], "warmup=50 is longer than steps=9"),
        (["forgetting", str(run), "--onto", empty], "empty"),
    ):
        try:
            code = main([*words, "--out", str(tmp_path / "out")])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        assert code != 0, words
        assert said.err.startswith(f"polyak {words[0]}: "), words
        assert says in said.err, words
        assert said.err.count("\n") == 1, said.err
        assert said.out == "", words


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path, corpus: Path) -> None:
    made = answer(
        *("prepare", corpus, "--tokenizer", "bpe-270"), cwd=tmp_path, cache=tmp_path / "cache"
    )
    assert made.returncode == 0, made.stderr
    (folder,) = (tmp_path / "cache" / "prepared").iterdir()
    found = answer(
        *("evaluate", run, "--corpora", folder, "--out", tmp_path / "out"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
    )
    assert found.returncode == 1
    assert "was prepared with tokenizer 'bpe-270', but mine was trained with 'bytes'" in (
        found.stderr
    )
    assert found.stderr.count("\n") == 1
