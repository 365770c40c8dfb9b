"""Several real processes on the CPU train what one process trains."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import BATCH, UNUSED_PARTS, Case, Training, request, results, run, torchrun

from polyak import Transformer
from polyak.errors import ConfigError, RunError
from polyak.training.loss import LossModule
from polyak.training.processes.distributed import clip_grad_norm, wrap
from polyak.training.processes.world import World

RULES = ("gradient_descent", "triple_momentum", "adam", "soap")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def check_equal_to_one_process(folder: Path, cases: list[Case], tolerance: float = 1e-5) -> None:
    for case in cases:
        losses, weights = run(dataclasses.replace(case, strategy="none"), World())
        found_losses, found_weights = results(folder, case)
        # the clip is active: what is compared went through it
        assert all(row[1] > 1.5 * case.clip for row in losses), case.name
        assert losses[-1][0] < losses[0][0] - 0.1, f"{case.name} learned nothing"
        for one, several in zip(losses, found_losses, strict=True):
            assert several == pytest.approx(one, rel=0, abs=tolerance), case.name
        assert weights.keys() == found_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(
                found_weights[name], weight, rtol=0, atol=tolerance, msg=f"{case.name} {name}"
            )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    cases = [Case("triple_momentum", "ddp"), Case("triple_momentum", "fsdp")]
    request(tmp_path, cases)
    torchrun(2, "train", tmp_path)
    check_equal_to_one_process(tmp_path, cases)


@pytest.mark.slow
def test_two_processes_equal_one_for_more_rules_and_optimizers(tmp_path: Path) -> None:
    cases = [
        Case(rule, strategy, **fields)  # type: ignore[arg-type]
        for strategy in ("ddp", "fsdp")
        for rule, fields in (
            *((rule, {}) for rule in (*RULES, "adamw", "muon", UNUSED_PARTS)),
            ("triple_momentum", {"optimizer": "adamw"}),
            ("triple_momentum", {"sam": "always"}),
        )
    ]
    request(tmp_path, cases)
    torchrun(2, "train", tmp_path)
    check_equal_to_one_process(tmp_path, cases)


@pytest.mark.slow
def test_three_processes_with_uneven_shards_equal_one(tmp_path: Path) -> None:
    cases = [Case("adamw", "ddp"), Case("adamw", "fsdp")]
    request(tmp_path, cases)
    torchrun(3, "train", tmp_path)
    check_equal_to_one_process(tmp_path, cases)


@pytest.mark.slow
def test_bfloat16_weights_train_like_autocast(tmp_path: Path) -> None:
    cases = [Case("triple_momentum", strategy, bfloat16=True) for strategy in ("ddp", "fsdp")]
    request(tmp_path, cases)
    torchrun(2, "train", tmp_path)
    exact, _ = run(Case("triple_momentum"), World())
    for case in cases:
        rounded, _ = run(dataclasses.replace(case, strategy="none"), World())
        found, weights = results(folder=tmp_path, case=case)
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        for one, several, full in zip(rounded, found, exact, strict=True):
            assert several[0] == pytest.approx(one[0], abs=0.02)
            assert one[0] == pytest.approx(full[0], abs=0.02)
        assert found != exact


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
@pytest.mark.parametrize("rule", RULES)
def test_compiled_blocks_train_like_eager_ones(rule: str) -> None:
    torch.compiler.reset()
    eager, expected = run(Case(rule, steps=6), World())
    compiled, weights = run(Case(rule, steps=6, compile=True), World())
    for one, other in zip(eager, compiled, strict=True):
        assert other == pytest.approx(one, rel=0, abs=1e-5)
    assert list(weights) == list(expected)  # names of checkpoints do not change
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
def test_compiled_blocks_in_two_processes_equal_one_eager_process(tmp_path: Path) -> None:
    cases = [Case("triple_momentum", strategy, compile=True) for strategy in ("ddp", "fsdp")]
    request(tmp_path, cases)
    torchrun(2, "train", tmp_path, timeout=600)
    for case in cases:
        eager = dataclasses.replace(case, strategy="none", compile=False)
        losses, weights = run(eager, World())
        found, found_weights = results(tmp_path, case)
        for one, several in zip(losses, found, strict=True):
            assert several == pytest.approx(one, rel=0, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_processes_talk_and_only_the_first_prints(tmp_path: Path) -> None:
    done = torchrun(2, "talk", tmp_path)
    assert done.stdout.strip() == "process 0 prints"
    found = [json.loads((tmp_path / f"talk-{rank}.json").read_text()) for rank in (0, 1)]
    assert [entry.pop("main") for entry in found] == [True, False]
    assert [entry.pop("order") for entry in found] == [[0, 2], [1, 2]]
    half = BATCH // 2
    assert [entry.pop("rows") for entry in found] == [[0, half], [half, BATCH]]
    assert found[0] == found[1]
    assert found[0] == {
        "met": True,
        "prepared": True,
        "sum": 2.0,
        "sums": [1.0, 2.0],
        "any": [True, False],
        "broadcast": {"from": 0, "text": "βββββ"},
        "gather": ["x", "xxxx"],
        "agreed": "process 1: its disk is full",
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_process_ends_the_job_with_its_error(
    tmp_path: Path, strategy: str, rank: int
) -> None:
    began = time.monotonic()
    done = torchrun(2, "fail", tmp_path, check=False, STRATEGY=strategy, FAILS=str(rank))
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("job: ")]
    prefix = "job: process 1 of 2: " if rank else "job: "
    assert told == [f"{prefix}the data of this process are gone"]


@pytest.mark.slow
def test_an_error_that_all_processes_find_is_told_once(tmp_path: Path) -> None:
    done = torchrun(2, "same", tmp_path, check=False)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("job: ")]
    assert len(told) == 1
    assert told[0].startswith("job: batch_size=7 cannot be shared equally by 2 processes")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    began = time.monotonic()
    done = torchrun(2, "die", tmp_path, check=False)
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr  # torchrun's own report of the first failure


@pytest.mark.parametrize(
    ("size", "batch", "better"), [(2, 7, 8), (3, 8, 9), (4, 2, 4), (5, 12, 10)]
)
def test_a_batch_that_processes_cannot_share_is_refused_with_one_they_can(
    size: int, batch: int, better: int
) -> None:
    message = rf"batch_size={batch} cannot be shared equally by {size} .*set .* to {better},"
    with pytest.raises(ConfigError, match=message):
        World(size=size).rows(batch)


def test_the_rows_of_all_processes_are_the_batch() -> None:
    rows = [World(rank=rank, size=4).rows(12) for rank in range(4)]
    assert [row for part in rows for row in range(12)[part]] == list(range(12))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK are set but WORLD_SIZE, LOCAL_RANK not"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        World.start("cpu")


def test_without_torchrun_there_is_one_process_and_no_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # as schedulers set it
    with World.start("cpu") as world:
        assert (world.rank, world.size, world.main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert world.sum(2.5) == 2.5
        assert world.any(True)
        assert not world.any(False)
        assert world.broadcast([1, None]) == [1, None]
        assert world.gather("a") == ["a"]
        world.barrier()
        with world.main_first():
            pass
        world.agree(None)
        with pytest.raises(RunError, match=r"^no$"):
            world.agree(RunError("no"))
        print("heard")
    assert capsys.readouterr().out == "heard\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_where_there_is_none_is_one_line() -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        World.start("cuda")


def test_strategies_that_cannot_work_are_refused(
    tiny_model: Callable[..., Transformer],
) -> None:
    loss = LossModule(tiny_model("gradient_descent"))
    with pytest.raises(ConfigError, match=r"'dpp'.*did you mean 'ddp'"):
        wrap(loss, "dpp", World())
    with pytest.raises(ConfigError, match="parallel='none' with 2 processes"):
        wrap(loss, "none", World(size=2))


def test_one_process_needs_no_wrapping() -> None:
    for strategy in ("auto", "none", "ddp", "fsdp"):
        training = Training(Case("gradient_descent", strategy), World())
        assert isinstance(training.loss.module, LossModule)


def test_clipping_returns_the_norm_before_and_leaves_the_limit() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    assert clip_grad_norm(parameters, 1.0) == pytest.approx(32**0.5)
    assert clip_grad_norm(parameters, 10.0) == pytest.approx(1.0, abs=1e-5)
