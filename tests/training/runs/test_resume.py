"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import run_config, write_corpus

from polyak import load_run, rules
from polyak.errors import RunError
from polyak.files import sha256_of
from polyak.training.config.run import RunConfig
from polyak.training.loop import CHANGEABLE, train

TIMES = (
    "seconds",
    "tokens_per_second",
    "flops_per_second",
    "peak_fraction",
    "memory_bytes",
    "peak_memory_bytes",
)


class KilledError(BaseException):
    """Stands for a kill: nothing in polyak catches it."""


def killed_at(config: RunConfig, folder: Path, step: int, *, resume: bool | None = None) -> None:
    """Train until the end of a step, and no further."""

    def progress(at: dict[str, Any]) -> None:
        if at["step"] == step:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, folder, progress=progress, resume=resume)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The log without times and without the events of stopping and saving."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in found
        if row["kind"] not in ("resume", "checkpoint", "cut")
    ]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def optimizer_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors")


def same_end(a: Path, b: Path, step: int) -> None:
    """Equal to the last bit: log, weights, optimizer state."""
    assert rows(a) == rows(b)
    assert weights(a) == weights(b)
    first, second = optimizer_state(a, step), optimizer_state(b, step)
    assert first.keys() == second.keys()
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)


# Exactly


@pytest.mark.parametrize("rule", rules.names())
def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(
    corpus: Path, tmp_path: Path, rule: str
) -> None:
    fields: dict[str, Any] = {"dropout": 0.1, "micro_batch_size": 2, "eval_every": 4}
    config = run_config(corpus, rule, steps=14, checkpoint_every=7, **fields)
    train(config, tmp_path / "unbroken", last_checkpoint=True)
    state = torch.get_rng_state()
    killed_at(config, tmp_path / "broken", 9)  # two steps are lost and done again
    torch.manual_seed(5)
    train(config, tmp_path / "broken", resume=True, last_checkpoint=True)
    assert torch.equal(state, torch.get_rng_state())
    same_end(tmp_path / "unbroken", tmp_path / "broken", 14)


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw"},
        {"schedule": "wsd", "decay_start": 0.5, "sam": "decay"},
        {"sam": "always", "schedule": "constant"},
        {"stream_start": "zeros", "splitting": "simultaneous"},
        {"vocabulary_loss": "chunked"},
    ],
)
def test_it_is_for_every_recipe_too_wherever_it_is_broken_off(
    corpus: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    config = run_config(corpus, "triple_momentum", steps=8, checkpoint_every=1, **fields)
    train(config, tmp_path / "unbroken", last_checkpoint=True)
    for step in (1, 2, 4, 7):
        killed_at(config, tmp_path / "broken", step, resume=None)
    train(config, tmp_path / "broken", resume=True, last_checkpoint=True)
    same_end(tmp_path / "unbroken", tmp_path / "broken", 8)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    corpus: Path, tmp_path: Path
) -> None:
    config = run_config(corpus, steps=6)
    train(config, tmp_path / "unbroken")
    killed_at(config, tmp_path / "broken", 3)
    assert not (tmp_path / "broken" / "checkpoints").exists()
    train(config, tmp_path / "broken", resume=True)
    assert weights(tmp_path / "unbroken") == weights(tmp_path / "broken")
    assert rows(tmp_path / "unbroken") == rows(tmp_path / "broken")


def test_the_log_tells_of_the_resume_and_repeats_no_step(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=24, checkpoint_every=5, eval_every=6)
    killed_at(config, tmp_path, 13)
    train(config, tmp_path, resume=True)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if row["kind"] == "train"] == [10, 20, 24]
    assert [row["step"] for row in found if row["kind"] == "validation"] == [6, 12, 18, 24]
    [resumed] = [row for row in found if row["kind"] == "resume"]
    assert (resumed["step"], resumed["checkpoint"]) == (10, "step-000010")
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert [(row["step"], row["changes"]) for row in recorded["resumed"]] == [(10, {})]
    assert recorded["resumed"][0]["environment"]["versions"]["torch"] == torch.__version__


def test_a_finished_run_is_returned_as_it_is(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=6, checkpoint_every=2)
    first = train(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(config, tmp_path, resume=True) == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


# Changes


def test_the_end_may_move_and_that_is_recorded(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=6, schedule="constant", warmup=0.0)
    train(config, tmp_path / "a", last_checkpoint=True)
    longer = replace(config, training=replace(config.training, steps=10))
    train(longer, tmp_path / "a", resume=True)
    train(longer, tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")  # a constant rate knows no end
    recorded = json.loads((tmp_path / "a" / "run.json").read_text())
    assert recorded["settings"]["training"]["steps"] == 10
    assert recorded["resumed"][0]["changes"] == {"training.steps": [6, 10]}
    assert recorded["resumed"][0]["step"] == 6
    assert load_run(tmp_path / "a")


def test_an_end_before_the_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=6, checkpoint_every=4)
    killed_at(config, tmp_path, 5)
    shorter = replace(config, training=replace(config.training, steps=3))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunError, match=r"training\.steps=3 is before .* step 4"):
        train(shorter, tmp_path, resume=True)
    assert (tmp_path / "run.json").read_bytes() == before


def test_an_end_moved_onto_a_checkpoint_is_validated_and_logged_there(
    corpus: Path, tmp_path: Path
) -> None:
    config = run_config(corpus, steps=9, checkpoint_every=5, eval_every=20)
    killed_at(config, tmp_path, 7)
    result = train(
        replace(config, training=replace(config.training, steps=5)), tmp_path, resume=True
    )
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [check] = [row for row in found if row["kind"] == "validation"]
    assert (check["step"], check["loss"]) == (5, result["loss"])
    assert [row["step"] for row in found if row["kind"] == "train"] == [5]


def test_a_kill_while_a_finished_run_is_prolonged_does_not_end_it(
    corpus: Path, tmp_path: Path
) -> None:
    config = run_config(corpus, steps=4)
    train(config, tmp_path, last_checkpoint=True)
    longer = replace(config, training=replace(config.training, steps=8))
    recorded = json.loads((tmp_path / "run.json").read_text())
    recorded["settings"]["training"]["steps"] = recorded["config"]["training"]["steps"] = 8
    (tmp_path / "run.json").write_text(json.dumps(recorded))  # killed before anything else
    assert train(longer, tmp_path, resume=True)["steps"] == 8


def test_the_end_may_move_before_the_first_checkpoint(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=6)
    killed_at(config, tmp_path, 2)
    longer = replace(config, training=replace(config.training, steps=7))
    assert train(longer, tmp_path, resume=True)["steps"] == 7


def test_what_changes_nothing_in_a_finished_run_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=2)
    train(config, tmp_path)
    other = replace(config, training=replace(config.training, eval_every=1))
    with pytest.raises(RunError, match=r"finished, so training\.eval_every changes nothing"):
        train(other, tmp_path, resume=True)


def test_flops_count_the_second_gradient_where_there_is_one(corpus: Path, tmp_path: Path) -> None:
    fields = {"schedule": "wsd", "decay_start": 0.5, "sam": "decay", "warmup": 0.0}
    train(run_config(corpus, steps=40, **fields), tmp_path)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    flops = {row["step"]: row["flops"] for row in found if row["kind"] == "train"}
    assert flops[20] == 2 * flops[10]
    assert flops[30] - flops[20] == flops[40] - flops[30] == flops[20]


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"d_model": 32}, r"model\.d_model: 16 there, 32 now"),
        ({"rule": "adam"}, r"model\.rule: 'triple_momentum' there, 'adam' now"),
        ({"muon_lr": 0.5}, r"training\.muon_lr: 0\.02 there, 0\.5 now"),
        ({"seed": 3}, r"training\.seed: 0 there, 3 now"),
    ],
)
def test_another_model_or_recipe_is_refused_with_the_difference(
    corpus: Path, tmp_path: Path, fields: dict[str, Any], shown: str
) -> None:
    config = run_config(corpus, "triple_momentum", steps=6, checkpoint_every=2)
    killed_at(config, tmp_path, 3)
    other = run_config(
        corpus, **{"rule": "triple_momentum", "steps": 6, "checkpoint_every": 2, **fields}
    )
    with pytest.raises(RunError, match=shown):
        train(other, tmp_path, resume=True)


def test_another_corpus_or_tokenizer_is_refused_with_the_difference(
    corpus: Path, tmp_path: Path
) -> None:
    config = run_config(corpus, steps=6, checkpoint_every=2, vocab_size=300)
    killed_at(config, tmp_path / "run", 3)
    (tmp_path / "texts").mkdir()
    other = replace(config, corpus=str(write_corpus(tmp_path / "texts", lines=300)))
    with pytest.raises(RunError, match=r"corpus\.fingerprint: '\w+' there, '\w+' now"):
        train(other, tmp_path / "run", resume=True)
    bpe = replace(config, tokenizer="bpe-260")
    with pytest.raises(RunError, match=r"tokenizer\.name: 'bytes' there, 'bpe-260' now"):
        train(bpe, tmp_path / "run", resume=True)


def test_what_may_change_are_settings() -> None:
    for name in CHANGEABLE:
        room, field = name.split(".")
        assert field in getattr(RunConfig(), room).to_dict()


def test_resuming_nothing_and_beginning_on_a_run_are_refused(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=2)
    with pytest.raises(RunError, match=r"is not a run: run\.json is missing"):
        train(config, tmp_path, resume=True)
    assert not list(tmp_path.iterdir())
    train(config, tmp_path)
    with pytest.raises(RunError, match="holds a run already; add --resume"):
        train(config, tmp_path, resume=False)


# Damage


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-7])
    elif how == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    corpus: Path, tmp_path: Path, file: str, how: str
) -> None:
    config = run_config(corpus, "heavy_ball", steps=8, checkpoint_every=2)
    killed_at(config, tmp_path / "run", 5)
    assert checkpoints(tmp_path / "run") == ["step-000002", "step-000004"]
    spoil(tmp_path / "run" / "checkpoints" / "step-000004" / file, how)
    with pytest.warns(UserWarning, match="step-000004.*trying the one before") as caught:
        train(config, tmp_path / "run", resume=True)
    assert "\n" not in str(caught[0].message)
    train(config, tmp_path / "unbroken")
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
    assert checkpoints(tmp_path / "run") == ["step-000004", "step-000006"]  # the new 4 is whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = replace(config, training=replace(config.training, steps=9))
        train(longer, tmp_path / "run", resume=True)


def test_a_manifest_that_leaves_files_out_is_no_manifest(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=8, checkpoint_every=2)
    killed_at(config, tmp_path, 5)
    manifest = tmp_path / "checkpoints" / "step-000004" / "manifest.json"
    manifest.write_text(json.dumps({"format": 1, "step": 4, "files": {}}))
    with pytest.warns(UserWarning, match=r"step-000004/manifest\.json is not the manifest"):
        train(config, tmp_path, resume=True)


@pytest.mark.parametrize("change", [{"step": 3}, {"step": "4"}, {"recent": None}, {"new": 1}])
def test_counters_that_do_not_fit_are_one_line(
    corpus: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    config = run_config(corpus, steps=8, checkpoint_every=2)
    killed_at(config, tmp_path, 5)
    folder = tmp_path / "checkpoints" / "step-000004"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **change}))
    honest(folder, "state.json")
    said = r"state\.json( is not the state of this checkpoint|: (step|recent) must be a )"
    with pytest.raises(RunError, match=said):
        train(config, tmp_path, resume=True)


def honest(folder: Path, file: str) -> None:
    """Write a file's true size and hash into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {
        "bytes": (folder / file).stat().st_size,
        "sha256": sha256_of(folder / file),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_when_all_are_damaged_nothing_is_touched(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=8, checkpoint_every=2)
    killed_at(config, tmp_path, 5)
    for path in (tmp_path / "checkpoints").iterdir():
        spoil(path / "model.safetensors", "truncated")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with (
        pytest.warns(UserWarning, match="trying the one before"),
        pytest.raises(RunError, match=r"no checkpoint of .* is whole, the newest is .*step-000004"),
    ):
        train(config, tmp_path, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=12, checkpoint_every=3, keep_checkpoints=2)
    killed_at(config, tmp_path, 7)
    spoil(tmp_path / "checkpoints" / "step-000006" / "state.json", "missing")
    faster = replace(config, training=replace(config.training, checkpoint_every=4))
    with pytest.warns(UserWarning, match="step-000006"):
        killed_at(faster, tmp_path, 5, resume=True)
    assert checkpoints(tmp_path) == ["step-000003", "step-000004", "step-000006"]


class _Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.witness)!r}, 'w').close()",))


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_loading_never_runs_code(corpus: Path, tmp_path: Path, file: str, kind: str) -> None:
    config = run_config(corpus, steps=8, checkpoint_every=2)
    run, witness = tmp_path / "run", tmp_path / "witness"
    killed_at(config, run, 3)
    folder = run / "checkpoints" / "step-000002"
    if kind == "pickle":
        (folder / file).write_bytes(pickle.dumps(_Malicious(witness)))
    else:
        torch.save(_Malicious(witness), folder / file)
    honest(folder, file)  # the attacker writes an honest manifest
    with pytest.raises(RunError) as caught:
        train(config, run, resume=True)
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    content = (folder / file).read_bytes()
    if kind == "pickle":
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert witness.exists()  # it would have worked


# How many are kept


def test_at_least_two_are_kept_and_left_overs_are_swept(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=9, checkpoint_every=1, keep_checkpoints=3)
    killed_at(config, tmp_path, 2)
    left = tmp_path / "checkpoints" / ".writing-step-000003"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    train(config, tmp_path, resume=True, last_checkpoint=True)
    assert checkpoints(tmp_path) == ["step-000007", "step-000008", "step-000009"]


def test_checkpoints_by_time(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=5, checkpoint_minutes=1e-9)
    killed_at(config, tmp_path, 4)
    assert checkpoints(tmp_path) == ["step-000002", "step-000003"]
