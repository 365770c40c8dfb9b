from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_config

from polyak import load_run
from polyak.data.prepare import prepare
from polyak.errors import PolyakError, RunError
from polyak.training.loop import train
from polyak.training.runs.folder import RunFolder
from polyak.training.runs.metrics import MetricsLog
from polyak.training.trainer import Trainer


@pytest.fixture
def finished(corpus: Path, tmp_path: Path) -> Path:
    """The folder of a finished run of 3 steps."""
    folder = tmp_path / "run"
    train(run_config(corpus, "triple_momentum", steps=3), folder)
    return folder


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


# Loading


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("triple_momentum", {}),
        ("gradient_descent", {"tie_embeddings": False, "bias": True}),
        ("muon", {"splitting": "simultaneous", "rule_options": {"frozen": ["beta"]}}),
        ("nesterov", {"stream_start": "zeros"}),
    ],
)
def test_a_loaded_run_is_the_trained_model_to_the_last_bit(
    corpus: Path, tmp_path: Path, rule: str, fields: dict[str, Any]
) -> None:
    config = run_config(corpus, rule, steps=3, **fields)
    train(config, tmp_path)
    again = Trainer(config, prepare(config.corpus))
    again.model.train()
    for step in range(3):
        again.step(step)
    model, tokenizer = load_run(tmp_path)
    assert not model.training
    ids = torch.from_numpy(tokenizer.encode("the quick brown"))[None].long()
    with torch.no_grad():
        assert torch.equal(model(ids), again.model.eval()(ids))
    assert model.config == config.model
    assert tokenizer.decode(ids[0].numpy()) == "the quick brown"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"is not a run: run.json is missing") as caught:
            load_run(folder)
        one_line(caught.value)


def test_a_run_that_did_not_finish_is_refused_even_if_its_weights_are_there(finished: Path) -> None:
    (finished / "result.json").unlink()
    with pytest.raises(RunError, match="did not finish"):
        load_run(finished)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_weights_are_refused_in_one_line(finished: Path, keep: int) -> None:
    file = finished / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    for said in ("is not the file that was written here", "cannot be loaded: "):
        with pytest.raises(RunError, match=rf"model.safetensors {said}") as caught:
            load_run(finished)
        one_line(caught.value)
        (finished / "model" / "weights.json").unlink(missing_ok=True)  # as in older runs


def test_weights_that_do_not_fit_are_refused_in_one_line(finished: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = finished / "model" / "model.safetensors"
    weights = load_file(file)
    (finished / "model" / "weights.json").unlink()
    for changed, said in (
        (
            {k: v for k, v in weights.items() if k != "norm.weight"},
            "weights do not fit config.json",
        ),
        ({**weights, "extra": torch.zeros(1)}, "extra|do not fit"),
        ({**weights, "norm.weight": torch.zeros(3)}, "size mismatch|do not fit"),
    ):
        save_file(changed, file)
        with pytest.raises(RunError, match=said) as caught:
            load_run(finished)
        one_line(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"polyak": 3}', '{"polyak": {"x": 1}}'])
def test_a_spoilt_configuration_is_refused_in_one_line(finished: Path, content: str) -> None:
    (finished / "model" / "config.json").write_text(content)
    with pytest.raises(PolyakError) as caught:
        load_run(finished)
    one_line(caught.value)


# The folder


def test_other_settings_are_refused_with_the_difference(corpus: Path, finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(RunError) as caught:
        train(run_config(corpus, "triple_momentum", steps=4, muon_lr=0.5), finished)
    text = one_line(caught.value)
    assert "training.muon_lr: 0.02 there, 0.5 now" in text
    assert "training.steps: 3 there, 4 now" in text
    assert "choose another --out" in text
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_another_corpus_is_other_settings(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("some other text\n" * 200)
    with pytest.raises(RunError, match=r"corpus.fingerprint: "):
        train(run_config(other, "triple_momentum", steps=3), finished)


def test_an_unfinished_run_begins_anew_and_leaves_no_old_rows(corpus: Path, finished: Path) -> None:
    run = RunFolder(finished)
    rows = [(row["kind"], row["step"], row["loss"]) for row in run.metrics()]
    run.result_file.unlink()
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "step": 99, "loss": 1.0}\n')
    train(run_config(corpus, "triple_momentum", steps=3), finished)
    assert [(row["kind"], row["step"], row["loss"]) for row in run.metrics()] == rows


def test_run_json_says_what_ran_and_where(finished: Path) -> None:
    content = json.loads((finished / "run.json").read_text())
    settings, environment = content["settings"], content["environment"]
    assert settings["model"]["rule"] == "triple_momentum"
    assert settings["training"]["steps"] == 3
    assert all(settings[part]["fingerprint"] for part in ("corpus", "tokenizer", "validation"))
    assert environment["versions"].keys() >= {"polyak", "python", "torch"}
    assert environment["machine"]["cores"] >= 1


# Metrics


def test_a_last_line_that_was_cut_is_left_out(finished: Path) -> None:
    run = RunFolder(finished)
    whole = run.metrics_file.read_bytes()
    rows = run.metrics()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in (last + 1, last + 20, len(whole) - 1):
        run.metrics_file.write_bytes(whole[:cut])
        assert run.metrics() == rows[:-1]
    run.metrics_file.write_bytes(whole[: last + 2] + "…".encode()[:1])  # half a character
    assert run.metrics() == rows[:-1]
    assert run.metrics("validation") == [r for r in rows[:-1] if r["kind"] == "validation"]


def test_a_spoilt_line_is_named(finished: Path) -> None:
    run = RunFolder(finished)
    for spoilt in ("not json", "[1]", '{"step": 1}'):
        run.metrics_file.write_text('{"kind": "train", "step": 0}\n' + spoilt + "\n")
        with pytest.raises(RunError, match=r"metrics.jsonl, line 2: not a row") as caught:
            run.metrics("train")
        one_line(caught.value)


def test_no_metrics_yet_is_no_rows(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).metrics() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a full device")
def test_a_full_disk_is_one_line_not_two_errors() -> None:
    with (
        pytest.raises(RunError, match=r"cannot write /dev/full: No space left on device") as caught,
        MetricsLog(Path("/dev/full")) as log,
    ):
        log.write("train", step=1)
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC
