"""`polyak train`: its options, --dry-run, one-line refusals, and a run that goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import SETTINGS, TWIN, answer, polyak

from polyak.cli.main import main
from polyak.errors import ConfigError
from polyak.training.config import recipes
from polyak.training.train_config import TrainOptions, resolve

Streams = pytest.CaptureFixture[str]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(corpus: Path, tmp_path: Path, capsys: Streams) -> Run:
    """`run(*words)`: (code, output, error) of a tiny training run that goes to `out`."""

    def call(*words: object, corpus_too: bool = True) -> tuple[int, str, str]:
        given = [str(word) for word in words]
        base = ["train", "--out", str(tmp_path / "out")]
        if corpus_too and "--corpus" not in given:
            base += ["--corpus", str(corpus)]
        capsys.readouterr()
        try:
            code = main([*base, *given])
        except SystemExit as stop:  # options that cannot be read
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., None]:
    """`refused(says, *words)`: one line on standard error that says so, and nothing is made."""

    def check(says: str, *words: object) -> None:
        for mode in (["--dry-run"], []):
            planning = {"--tokens-per-second", "--processes"} & set(words)
            if planning and not mode:
                continue
            code, output, error = run(*words, *mode)
            assert code not in (0, 130)
            assert error.count("\n") == 1, error
            assert error.startswith("polyak train: ")
            assert says in error
            assert "Traceback" not in error
            assert output == ""
            assert not (tmp_path / "out").exists()

    return check


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("unknown recipe 'quik'; did you mean 'quick'?", ["--recipe", "quik"]),
        ("did you mean 'paper-tinystories-wsd'?", ["--recipe", "paper-tinystory-wsd"]),
        ("recipe mine.toml: there is no such file", ["--recipe", "mine.toml"]),
        ("'triple_momentun'; did you mean 'triple_momentum'?", ["--rule", "triple_momentun"]),
        ("'strem_start'; did you mean 'stream_start'?", ["--rule", "adam[strem_start=zeros]"]),
        ("cannot read 'adam[d_model=8'", ["--rule", "adam[d_model=8"]),
        ("'bia'", ["--rule", "adam[bia=true]"]),
        ("model.num_layers='x' must be a whole number", ["--rule", "adam[num_layers=x]"]),
        ("has no stream that starts from an embed", ["--rule", "ortho[stream_start=zeros]"]),
        ("'tinystory'; did you mean 'tinystories'?", ["--corpus", "tinystory"]),
        ("unknown tokenizer 'gtp2'; did you mean 'gpt2'?", ["--tokenizer", "gtp2"]),
        ("'bpe-10' is too small", ["--tokenizer", "bpe-10"]),
        ("--steps", ["--steps", "many"]),
        ("steps=0 must be a whole number of at least 1", ["--steps", "0"]),
        ("seed=-1 must be a whole number", ["--seed", "-1"]),
        (
            "unknown key 'training.step'; did you mean 'training.steps'?",
            ["--set", "training.step=3"],
        ),
        ("did you mean 'model.num_layers'?", ["--set", "num_layers=3"]),
        ("did you mean 'training.muon_lr'?", ["--set", "model.muon_lr=3"]),
        ("did you mean 'threads'?", ["--set", "thread=3"]),
        ("must be a whole number", ["--set", "model.num_layers=three"]),
        ("training.muon_lr='fast' must be a number", ["--set", "training.muon_lr=fast"]),
        ("training.compile='yes' must be true or false", ["--set", "training.compile=yes"]),
        ("'cosin'; did you mean 'cosine'?", ["--set", "training.schedule=cosin"]),
        ("--set 'training.steps' has no '='", ["--set", "training.steps"]),
        ("model is a table", ["--set", "model=3"]),
        (
            "training.steps is set by --steps and --set",
            ["--steps", "3", "--set", "training.steps=4"],
        ),
        ("threads is set by --set twice", ["--set", "threads=3", "--set", "threads=4"]),
        ("unknown tracker 'tensorbord'; did you mean 'tensorboard'?", ["--track", "tensorbord"]),
        ("num_heads=3 does not divide d_model=128", ["--set", "model.num_heads=3"]),
        ("model.vocab_size=100 is smaller than the 256", ["--set", "model.vocab_size=100"]),
        ("training.eval_tokens=8 is less than one block", ["--set", "training.eval_tokens=8"]),
        ("micro_batch_size=3 does not divide", ["--set", "training.micro_batch_size=3"]),
        ("sam='decay' needs a decay phase", ["--set", "training.sam=decay"]),
        ("is not a run: run.json is missing", ["--resume"]),
        ("is not a run: run.json is missing", ["--resume", "--recipe", "quick"]),
        ("--corpos", ["--corpos", "x"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line(
    says: str, words: list[str], refused: Callable[..., None]
) -> None:
    refused(says, *words)


def test_plans_that_cannot_work_are_refused(refused: Callable[..., None]) -> None:
    refused("does not divide over 3 processes", "--processes", "3")
    refused("--processes=0 must be above 0", "--processes", "0")
    refused("--tokens-per-second=-1.0 must be above 0", "--tokens-per-second", "-1")
    refused("--tokens-per-second", "--tokens-per-second", "fast")


def test_more_memory_than_there_is_is_refused_after_the_numbers(run: Run) -> None:
    words = ("--device", "cpu", "--dry-run", "--set", "training.batch_size=8000000")
    code, output, error = run(*words)
    assert code == 1
    assert re.search(r"training needs about [\d.]+ GiB of memory, and this machine has", error)
    assert "lower training.micro_batch_size" in error
    assert "peak of forward and backward" in output


def test_planning_options_need_a_dry_run() -> None:
    with pytest.raises(ConfigError, match="--processes plans a run; add --dry-run"):
        TrainOptions(processes=2)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--recipe", "small-owt", "--rule", "triple_momentum[stream_start=zeros,mu=0.3]"],
        ["--recipe", "quick", "--set", "threads=1", "--set", "training.adam_betas=0.8+0.9"],
    ],
    ids=str,
)
def test_a_dry_run_prints_a_recipe_that_gives_the_same_run(
    words: list[str], run: Run, tmp_path: Path, corpus: Path
) -> None:
    code, output, error = run(*words, "--tokens-per-second", "1000", "--dry-run")
    assert (code, error) == (0, "")
    assert not (tmp_path / "out").exists()
    lines = output.splitlines()
    assert max(len(line) for line in lines if str(corpus) not in line) <= 80
    text = "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:10] == "parameters")])
    tomllib.loads(text)
    (tmp_path / "printed.toml").write_text(text, encoding="utf-8")
    options = TrainOptions(
        corpus=str(corpus),
        recipe=words[1] if "--recipe" in words else None,
        rule=words[3] if "--rule" in words else None,
        set=tuple(w for w in words if w.startswith(("threads", "training"))),
    )
    assert recipes.load(str(tmp_path / "printed.toml")) == resolve(options)
    for name in ("parameters", "FLOPs a token", "memory of one process", "hours"):
        assert any(line.startswith(name) for line in lines), name


def test_without_a_speed_the_hours_are_said_to_be_unknown(run: Run) -> None:
    _, output, _ = run("--dry-run")
    assert "hours: give --tokens-per-second" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_plan_for_cuda_can_be_made_without_it(run: Run) -> None:
    code, output, _ = run("--recipe", "small-owt", "--device", "cuda", "--dry-run")
    assert code == 0
    assert "torch sees no CUDA device here" in output


def test_options_win_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        'base = "quick"\ncorpus = "prose"\n[model]\nrule = "triple_momentum"\n'
        'stream_start = "zeros"\n[model.rule_options]\nmu = 0.3\n'
    )
    recipe = str(tmp_path / "my.toml")
    plain = resolve(TrainOptions(recipe=recipe))
    assert (plain.corpus, plain.model.rule_options) == ("prose", {"mu": 0.3})
    # another rule: the recipe's options belong to the recipe's rule
    other = resolve(TrainOptions(recipe=recipe, rule="adam", corpus="stdlib", tokenizer="bpe-300"))
    assert other.model.rule == "adam"
    assert (other.model.rule_options, other.model.stream_start) == ({}, None)
    assert (other.corpus, other.model.vocab_size) == ("stdlib", 300)
    same = resolve(TrainOptions(recipe=recipe, rule="triple_momentum[beta=0.2]", seed=5, steps=9))
    assert same.model.rule_options == {"mu": 0.3, "beta": 0.2}
    assert (same.training.seed, same.training.steps) == (5, 9)
    tracked = resolve(
        TrainOptions(
            track="tensorboard, wandb", set=("model.rule_options.mu=0.1", "model.rule=nesterov")
        )
    )
    assert tracked.trackers == ("tensorboard", "wandb")
    assert tracked.model.rule_options == {"mu": 0.1}


def test_a_rule_of_ones_own_can_be_planned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "twin.py").write_text(TWIN)
    code, output, error = run("--rule", f"{tmp_path}/twin.py:Twin", "--dry-run")
    assert (code, error) == (0, "")
    assert f'rule = "{tmp_path}/twin.py:Twin"' in output


# Training


def test_a_run_begins_goes_on_and_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    def train(*words: object) -> tuple[int, str, str]:
        done = answer("train", "--out", "out", *words, cwd=tmp_path, cache=tmp_path / "cache")
        return done.returncode, done.stdout, done.stderr

    first = ("--corpus", corpus, "--device", "cpu", "--set", "threads=1", *SETTINGS)
    code, output, error = train("--rule", "nesterov[mu=0.3]", "--steps", 4, *first)
    assert (code, error) == (0, "")
    assert "step 4/4  loss " in output
    last = output.splitlines()[-1]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert last == (
        f"Finished 4 steps: validation loss {result['loss']:.4f} nats/token; folder: out"
    )
    code, _, error = train("--steps", 4, *first)
    assert code == 1
    assert error == (
        "polyak train: out holds a run already; add --resume, or choose another --out\n"
    )
    code, output, error = train("--resume", "--steps", 6)
    assert (code, error) == (0, "")
    assert output.splitlines()[-1].startswith("Finished 6 steps: ")
    code, _, error = train("--resume", "--rule", "adam")
    assert code == 1
    assert error.count("\n") == 1
    assert "model.rule: 'nesterov' there, 'adam' now" in error


def test_paths_are_as_a_shell_has_them(tmp_path: Path, corpus: Path) -> None:
    home = {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()

    def run(*words: object) -> tuple[int, str]:
        done = answer(*words, cwd=tmp_path, cache=tmp_path / "cache", **home)
        return done.returncode, done.stderr

    line = ["train", "--corpus", corpus, "--steps", 1, "--device", "cpu", *SETTINGS]
    assert run(*line, "--out=~/runs/a") == (0, "")
    assert (tmp_path / "home/runs/a/result.json").exists()
    assert not (tmp_path / "~").exists()
    for given in ([*line, "--out", ""], [*line, "--out="], ["prepare", corpus, "--cache", " "]):
        code, error = run(*given)
        assert (code, error.count("\n")) == (2, 1)
        assert "a path is empty (an unset variable?)" in error
    code, error = run("evaluate", "")
    assert (code, error.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == []


@pytest.mark.slow
def test_the_line_that_began_a_run_goes_on_with_it(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        '\ufeffbase = "quick"\r\n[training]\r\nmuon_lr = 0.01\r\nsteps = 4\r\n', encoding="utf-8"
    )
    line = [
        *("train", "--recipe", "mine.toml", "--rule", "triple_momentum[stream_start=zeros]"),
        *("--corpus", corpus, "--device", "cpu", "--seed", 3, "--set", "threads=1", *SETTINGS),
        *("--set", "training.checkpoint_every=2", "--out", "out"),
    ]

    def run(*words: object) -> tuple[int, str]:
        done = polyak(*words, cwd=tmp_path, cache=tmp_path / "cache")
        return done.returncode, done.stderr

    def undone() -> None:
        (tmp_path / "out/result.json").unlink()
        shutil.rmtree(tmp_path / "out/checkpoints/step-000004")

    assert run(*line) == (0, "")
    weights = (tmp_path / "out/model/model.safetensors").read_bytes()
    undone()
    assert run(*line, "--resume") == (0, "")
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == weights
    assert run(*line, "--resume") == (0, "")  # finished already
    undone()
    (tmp_path / "mine.toml").write_text('base = "quick"\n[training]\nsteps = 4\nmuon_lr = 0.03\n')
    code, error = run(*line, "--resume")
    assert (code, error.count("\n")) == (1, 1)
    assert "training.muon_lr: 0.01 there, 0.03 now" in error
    code, error = run(*line[:-2], "--seed", 4, *line[-2:], "--resume")
    assert code != 0
    assert run("train", "--out", "out", "--resume") == (0, "")  # with its own settings
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == weights
    begun = ["train", "--init", "out", "--steps", 2, *line[5:-2], "--out", "more"]
    assert run(*begun) == (0, "")
    (tmp_path / "more/result.json").unlink()
    assert run(*begun, "--resume") == (0, "")
    assert (tmp_path / "more/result.json").exists()


@pytest.mark.slow
def test_a_run_of_a_version_that_had_fewer_settings_goes_on(corpus: Path, tmp_path: Path) -> None:
    def train(*words: object) -> tuple[int, str]:
        done = polyak("train", "--out", "out", *words, cwd=tmp_path, cache=tmp_path / "cache")
        return done.returncode, done.stderr

    first = ("--corpus", corpus, "--device", "cpu", "--set", "threads=1", *SETTINGS)
    assert train("--steps", 2, *first) == (0, "")
    file = tmp_path / "out/run.json"
    recorded = json.loads(file.read_text())
    for part in ("settings", "config"):
        del recorded[part]["training"]["sam_rho"], recorded[part]["model"]["qk_norm"]
    file.write_text(json.dumps(recorded))
    assert train("--resume", "--steps", 4) == (0, "")
    again = json.loads(file.read_text())
    assert again["settings"]["model"]["qk_norm"] is False  # it is on record from now on
    for part in ("settings", "config"):
        del again[part]["training"]["sam_rho"]
    file.write_text(json.dumps(again))
    code, error = train("--resume", "--steps", 6, "--set", "training.sam_rho=0.1")
    assert (code, error.count("\n")) == (1, 1)
    assert "training.sam_rho: 0.05 there, 0.1 now" in error


def test_a_run_folder_that_is_not_one_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("[]")
    code, _, error = run("--resume", corpus_too=False)
    assert code == 1
    assert "run.json is not a run's" in error
    os.remove(tmp_path / "out" / "run.json")
    code, _, error = run("--resume", corpus_too=False)
    assert "is not a run: run.json is missing; leave out --resume" in error
