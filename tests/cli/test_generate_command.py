"""`polyak generate`: a real run, real processes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import answer, command, environment, run_config

from polyak.cli.main import main
from polyak.training.loop import train

Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        train(run_config(corpus, "triple_momentum", steps=40, adam_lr=0.02), folder / "run")
    return folder / "run"


def test_text_streams_and_results_tell_it_all(run: Path, tmp_path: Path, capsys: Streams) -> None:
    words = ["generate", str(run), "--prompt", "the ", "--max-new-tokens", "9"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["completions"]
    assert said.out == f"the {row['text']}\n"
    assert said.err == f"Results: {tmp_path / 'out' / 'results.json'}\n"
    assert row["prompt"] == "the "
    assert len(row["tokens"]) == results["new_tokens"] == 9
    assert results["sampling"]["temperature"] == 0.8
    assert main([*words, "--no-stream", "--no-echo"]) == 0
    assert capsys.readouterr().out == f"{row['text']}\n"


def test_rows_of_a_batch_are_what_they_are_alone(
    run: Path, tmp_path: Path, capsys: Streams
) -> None:
    (tmp_path / "prompts").write_text("quick brown\nfox\n\u00fcber the dog in\n", encoding="utf-8")
    same = ["generate", str(run), "--max-new-tokens", "40", "--temperature", "1"]
    many = [*same, "--prompt-file", str(tmp_path / "prompts"), "--num-samples", "2"]
    assert main([*many, "--out", str(tmp_path / "all")]) == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "all" / "results.json").read_text())["completions"]
    assert [(row["prompt"], row["seed"]) for row in found] == [
        (prompt, seed) for prompt in ("quick brown", "fox", "über the dog in") for seed in (0, 1)
    ]
    shown = "".join(
        f"── prompt {1 + place // 2}, sample {1 + place % 2} ──\n{row['prompt']}{row['text']}\n"
        for place, row in enumerate(found)
    )
    assert said.out == shown
    assert "16 tokens and 40 new ones are more than the context of 16" in said.err
    assert said.err.count("\n") == 2  # that, and where the results are
    assert main([*many, "--batch-size", "1"]) == 0
    assert capsys.readouterr().out == shown
    assert main([*same, "--prompt", "fox", "--seed", "1"]) == 0
    assert capsys.readouterr().out == f"fox{found[3]['text']}\n"


def test_text_appears_while_it_is_made(run: Path, tmp_path: Path) -> None:
    words = ("generate", run, "--max-new-tokens", "100000", "--ignore-end-of-text")
    process = subprocess.Popen(
        command(*words, "--prompt", "the"),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.read(40).startswith(b"the")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_standard_input_is_a_prompt_and_a_closed_pipe_ends_quietly(
    run: Path, tmp_path: Path
) -> None:
    script = " ".join(map(str, command("generate", run, "--temperature", "0")))
    found = subprocess.run(
        f"printf 'lazy\\n' | {script} --max-new-tokens 5000 | head -c 4",
        shell=True,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "lazy"
    assert found.stderr.count("\n") == 1
    assert "goes on from its last 8 tokens" in found.stderr


def test_what_cannot_be_generated_is_one_line(
    run: Path, tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nothing").write_text("")
    (tmp_path / "gap").write_text("a\n\nb\n")
    (tmp_path / "latin").write_bytes(b"gr\xf6\xdfe")
    (tmp_path / "folder").mkdir()
    prompt = ["--prompt", "a"]
    cases = {
        (str(tmp_path / "missing"), *prompt): "does not exist",
        (str(tmp_path / "folder"), *prompt): "is not a run: run.json is missing",
        (str(run / "model"), *prompt): "it is a model's folder: 'polyak import' makes a run of it",
        (str(run), "--prompt-file", str(tmp_path / "none")): "cannot read",
        (str(run), "--prompt-file", str(tmp_path / "nothing")): "is empty; write a prompt",
        (str(run), "--prompt-file", str(tmp_path / "gap")): "gap, line 2 is empty",
        (str(run), "--prompt-file", str(tmp_path / "latin")): "latin is not UTF-8",
        (str(run), "--prompt", "\udcff"): "not valid Unicode",
        (str(run), *prompt, "--out", str(tmp_path / "gap" / "out")): "cannot create folder",
    }
    for words, says in cases.items():
        assert main(["generate", *words]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert says in said.err
        assert said.err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert main(["generate", str(run)]) == 1
    assert "standard input is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "nan"], "temperature=nan must be a number of at least 0"),
        (["--top-p", "1.5"], "top_p=1.5 must be a number above 0, up to 1"),
        (["--num-samples", "0"], "num_samples=0 must be a whole number of at least 1"),
        (["--prompt-file", "b"], "prompt and prompt_file are both given; use one of them"),
        (["--top-q", "1"], "Unrecognized options: --top-q"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], says: str, run: Path, tmp_path: Path) -> None:
    found = answer("generate", run, "--prompt", "a", *words, cwd=tmp_path, cache=tmp_path)
    assert found.returncode in (1, 2)
    assert says in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_hundred_thousand_tokens_take_the_memory_of_a_thousand(
    corpus: Path, tmp_path: Path
) -> None:
    config = run_config(corpus, steps=4, attention="momentum", positions="rope")
    train(config, tmp_path / "run")
    code = (
        "import resource, sys; from polyak.cli.main import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    memory = {}
    for tokens in (1_000, 100_000):
        words = ["generate", str(tmp_path / "run"), "--prompt", "the", "--ignore-end-of-text"]
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--max-new-tokens", str(tokens)],
            env=environment(tmp_path / "cache"),
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        (said,) = done.stderr.decode().splitlines()  # no word of a context that is full
        memory[tokens] = int(said) * 1024
    assert memory[100_000] - memory[1_000] < 20 * 2**20
