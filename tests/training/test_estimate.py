"""Estimates against measurements, and the plans that are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_config

from polyak import ModelConfig, Transformer, rules
from polyak.bench.timing import peak_bytes
from polyak.errors import ConfigError, DataError, PolyakError, RuleError, UnknownNameError
from polyak.nn.cost import cost
from polyak.ops import inverse_sqrt
from polyak.rules import UpdateRule
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig
from polyak.training.estimate import (
    Processes,
    check_memory,
    check_plan,
    device_memory,
    estimate,
    gib,
)
from polyak.training.loss import LossModule
from polyak.training.memory import memory
from polyak.training.optimizers import Optimizers
from polyak.training.sam import perturbed
from polyak.training.trainer import precision

TOLERANCE = 0.02
SHAPES = {
    "activations": {"num_layers": 2, "d_model": 64, "context_length": 64, "vocab_size": 300},
    "vocabulary": {"num_layers": 1, "d_model": 32, "context_length": 64, "vocab_size": 20_000},
    "weights": {"num_layers": 2, "d_model": 128, "context_length": 16, "vocab_size": 64},
}


def config(shape: str, rule: str = "gradient_descent", **training: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(rule=rule, num_heads=2, **SHAPES[shape]),  # type: ignore[arg-type]
        training=TrainingConfig(**{"batch_size": 8, "eval_tokens": 128, **training}),
        device="cpu",
    )


def measured(run: RunConfig) -> tuple[int, int, int]:
    """Peaks of the two passes, the update and a validation batch, with what torch allocates."""
    recipe = run.training
    model = Transformer(run.model)
    loss, optimizers = LossModule(model, recipe.vocabulary_loss), Optimizers(model, recipe)
    length = run.model.context_length
    ids = torch.randint(run.model.vocab_size, (recipe.batch_size, length + 1))
    parameters = list(model.parameters())

    def accumulate() -> None:
        for part in ids.split(recipe.micro_batch_size or recipe.batch_size):
            with precision(torch.device("cpu"), recipe):
                loss(part).backward()

    def passes() -> None:
        accumulate()
        if recipe.sam != "off":
            with perturbed(parameters, recipe.sam_rho):
                accumulate()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizers.step(1.0)

    def validate() -> None:
        with torch.no_grad():
            loss(ids[: recipe.eval_tokens // length])

    passes()
    update()
    weights = sum(p.nbytes for p in parameters)
    resting = weights + sum(t.nbytes for t in optimizers.named_state(model).values())
    forward_backward = resting + peak_bytes(passes)
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    peak_of_update = resting + gradients + peak_bytes(update)
    model.eval()
    return forward_backward, peak_of_update, resting + peak_bytes(validate)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        *((r, "activations") for r in ("gradient_descent", "triple_momentum", "adam", "muon")),
        *((r, "vocabulary") for r in ("gradient_descent", "triple_momentum")),
        *((r, "weights") for r in ("gradient_descent", "soap")),
        ("soap", "activations"),
    ],
)
def test_estimated_peaks_are_those_measured(rule: str, shape: str) -> None:
    run = config(shape, rule)
    found = memory(run)
    expected = measured(run)
    assert (found.forward_backward, found.update, found.validation) == pytest.approx(
        expected, rel=TOLERANCE
    )


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum"])
def test_estimated_peaks_of_other_backbones_are_those_measured(rule: str, preset: Any) -> None:
    model = ModelConfig.preset(preset, rule=rule, num_heads=4, **SHAPES["activations"])
    run = dataclasses.replace(config("activations"), model=model)
    found = memory(run)
    assert (found.forward_backward, found.update, found.validation) == pytest.approx(
        measured(run), rel=TOLERANCE
    )


@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("momentum", "adaptive_momentum")),
    ],
)
def test_estimated_peaks_of_attention_with_a_state_are_those_measured(kind: str) -> None:
    run = config("activations")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention=kind))
    found = memory(run)
    assert (found.forward_backward, found.update, found.validation) == pytest.approx(
        measured(run), rel=TOLERANCE
    )


@pytest.mark.parametrize(
    ("shape", "training"),
    [
        ("activations", {"micro_batch_size": 2}),
        ("activations", {"optimizer": "adamw"}),
        ("weights", {"sam": "always"}),
        ("activations", {"sam": "always", "micro_batch_size": 4}),
        ("vocabulary", {"vocabulary_loss": "plain"}),
        ("vocabulary", {"vocabulary_loss": "chunked"}),
        ("activations", {"precision": "bfloat16"}),
        ("vocabulary", {"precision": "bfloat16"}),
    ],
    ids=str,
)
def test_estimated_peaks_follow_the_training_settings(shape: str, training: dict[str, Any]) -> None:
    run = config(shape, **training)
    found = memory(run)
    forward_backward, update, _ = measured(run)
    rough = 0.05 if "precision" in training else TOLERANCE  # bfloat16 kernels convert inside
    assert found.forward_backward == pytest.approx(forward_backward, rel=rough)
    assert found.update == pytest.approx(update, rel=TOLERANCE)


def test_parts_are_what_they_are_called() -> None:
    run = config("activations", "triple_momentum", micro_batch_size=4, sam="always")
    price, found = cost(run.model), memory(run, buckets=True)
    matrices = price.parameters["attention"] + price.parameters["mlp"]
    others = price.total_parameters - matrices
    assert found.weights == found.gradients == found.perturbation == 4 * price.total_parameters
    assert found.buckets == found.gradients
    # one momentum, or two moments and a step count of each parameter
    assert 0 <= found.optimizer - 4 * (matrices + 2 * others) < 4 * 100
    assert found.forward_backward == pytest.approx(
        found.weights * 2
        + found.optimizer
        + found.gradients * 2
        + found.activations
        + found.temporary,
        rel=0.01,
    )
    without = memory(dataclasses.replace(run, training=config("activations").training))
    assert (without.perturbation, without.buckets) == (0, 0)


def test_activations_grow_with_the_micro_batch_and_the_rule() -> None:
    one, two = (memory(config("activations", micro_batch_size=rows)).activations for rows in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    held = {
        rule: memory(config("activations", rule)).activations
        for rule in ("gradient_descent", "triple_momentum", "soap")
    }
    assert held["gradient_descent"] < held["triple_momentum"] < held["soap"]


def test_every_rule_can_be_estimated() -> None:
    for rule in rules.names():
        run = config("weights", rule)
        one_layer = dataclasses.replace(run.model, num_layers=1)
        assert memory(dataclasses.replace(run, model=one_layer)).activations > 0


def test_an_estimate_changes_nothing_for_training() -> None:
    kept = inverse_sqrt._value, inverse_sqrt._vjp
    with pytest.raises(PolyakError):
        memory(config("activations", "no_such_rule"))
    memory(config("activations", "soap"))
    assert (inverse_sqrt._value, inverse_sqrt._vjp) == kept
    assert torch.randn(3).sum().item() != 0  # real numbers again


def test_a_rule_that_asks_for_values_is_told_so(
    registered: Callable[[str, type[UpdateRule]], str],
) -> None:
    class Asks(UpdateRule):
        """Looks at x."""

        def step(self, x: Any, state: Any, oracle: Any) -> Any:
            return x + float(x.mean()) * oracle(x), state

    with pytest.raises(RuleError, match=r"needs the values of tensors .* cannot be estimated"):
        memory(config("weights", registered("asks", Asks)))


RESIDENT = """
import json, sys
import torch
from polyak import Transformer
from polyak.training.loss import LossModule
from polyak.training.memory import memory
from polyak.training.optimizers import Optimizers
from polyak.training.config.run import RunConfig
from polyak.training.machine import peak_memory_bytes

def train(run, steps):
    recipe = run.training
    model = Transformer(run.model)
    loss, optimizers = LossModule(model, recipe.vocabulary_loss), Optimizers(model, recipe)
    ids = torch.randint(run.model.vocab_size, (recipe.batch_size, run.model.context_length + 1))
    for _ in range(steps):
        for part in ids.split(recipe.micro_batch_size or recipe.batch_size):
            loss(part).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizers.step(1.0)

torch.set_num_threads(1)
small, run = (RunConfig.from_dict(values) for values in json.loads(sys.argv[1]))
train(small, 1)  # what torch itself takes at its first step
before = peak_memory_bytes()
train(run, 2)
grown = peak_memory_bytes() - before
found = memory(run)
print(grown / max(found.forward_backward, found.update), grown)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in KiB")
@pytest.mark.parametrize(
    ("rule", "sizes", "training"),
    [
        ("gradient_descent", (6, 256, 8192), {"batch_size": 8}),
        ("triple_momentum", (6, 256, 8192), {"batch_size": 8, "micro_batch_size": 4}),
        ("adam", (4, 256, 1024), {"batch_size": 8, "optimizer": "adamw"}),
        ("soap", (4, 256, 1024), {"batch_size": 4}),
        ("gradient_descent", (8, 512, 4096), {"batch_size": 2}),
    ],
)
def test_resident_memory_is_between_one_and_one_and_a_half_estimates(
    rule: str, sizes: tuple[int, int, int], training: dict[str, Any]
) -> None:
    layers, width, vocabulary = sizes
    model = ModelConfig(
        rule=rule, num_layers=layers, d_model=width, vocab_size=vocabulary, context_length=256
    )
    run = RunConfig(model=model, training=TrainingConfig(**training), device="cpu")
    small = dataclasses.replace(run, model=dataclasses.replace(config("weights").model, rule=rule))
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, json.dumps([small.to_dict(), run.to_dict()])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    ratio, grown = map(float, done.stdout.split())
    print(f"{rule} {sizes}: resident memory grew {grown / 2**20:.0f} MiB, {ratio:.2f} estimates")
    assert 1.0 <= ratio <= 1.5


# FLOPs, tokens, hours


def test_tokens_flops_and_hours() -> None:
    run = config("weights", steps=30, eval_every=8, eval_tokens=64)
    price = cost(run.model)
    found = estimate(run, tokens_per_second=64.0)
    assert found.tokens_per_step == 8 * 16
    assert found.tokens == 30 * 8 * 16
    assert found.flops_per_token == price.training_flops_per_token
    validation = 4 * 64 * price.forward_flops_per_token  # after steps 8, 16, 24 and 30
    assert found.flops == found.tokens * price.training_flops_per_token + validation
    assert found.hours == found.tokens / 64 / 3600
    assert found.total_parameters == price.total_parameters
    assert estimate(run).hours is None


def test_sams_second_gradients_are_counted() -> None:
    wsd = {"steps": 100, "schedule": "wsd", "decay_start": 0.75}
    plain, always, decay = (
        estimate(config("weights", **wsd, sam=sam)).flops for sam in ("off", "always", "decay")
    )
    passes = 100 * 8 * 16 * cost(config("weights").model).training_flops_per_token
    assert always - plain == pytest.approx(passes)
    assert decay - plain == pytest.approx(passes / 4)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_speeds_that_are_none_are_refused(speed: float) -> None:
    with pytest.raises(ConfigError, match="tokens_per_second"):
        estimate(config("weights"), tokens_per_second=speed)


def test_processes_share_the_batch_and_fsdp_the_weights() -> None:
    run = config("weights", batch_size=32)
    alone = estimate(run).memory
    ddp = estimate(run, processes=Processes(size=4, local=4)).memory
    sharded = dataclasses.replace(run, parallel="fsdp")
    fsdp = estimate(sharded, processes=Processes(size=4, local=4)).memory
    assert ddp.activations == pytest.approx(alone.activations / 4, rel=0.01)
    assert (alone.buckets, ddp.buckets, fsdp.buckets) == (0, ddp.gradients, 0)
    assert fsdp.weights == ddp.weights // 4
    assert fsdp.peak < ddp.peak


def test_processes_come_from_torchrun_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # schedulers set it too
    assert Processes.from_environment() == Processes(size=1, local=1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Processes.from_environment() == Processes(size=8, local=2)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE='many' must be a whole number"):
        Processes.from_environment()


# Refusals


@pytest.fixture
def refused(corpus: Path) -> Callable[..., None]:
    """`refused(says, processes, **fields)`: a tiny plan with these fields is refused."""

    def check(says: str, processes: int = 1, **fields: Any) -> None:
        own = {key: fields.pop(key) for key in ("tokenizer", "corpus") if key in fields}
        run = dataclasses.replace(run_config(corpus, **fields), **own)
        with pytest.raises(PolyakError) as found:
            check_plan(run, Processes(size=processes, local=processes))
        assert says in str(found.value)
        assert "\n" not in str(found.value)

    return check


def test_a_plan_that_can_work_is_not_refused(corpus: Path) -> None:
    check_plan(run_config(corpus), Processes())
    check_plan(run_config(corpus, micro_batch_size=2), Processes(size=2, local=2))
    for name in ("stdlib", "prose", "tinystories", "openwebtext"):
        check_plan(dataclasses.replace(run_config(corpus), corpus=name), Processes())


def test_impossible_plans_are_refused_in_one_line(
    refused: Callable[..., None], tmp_path: Path
) -> None:
    refused("model.vocab_size=256 is smaller than the 300 tokens", tokenizer="bpe-300")
    refused("model.vocab_size=50256 is smaller than the 50257", tokenizer="gpt2", vocab_size=50256)
    refused("model.vocab_size=255 is smaller than the 256", vocab_size=255)
    refused("unknown tokenizer 'gtp2'; did you mean 'gpt2'?", tokenizer="gtp2")
    refused("training.eval_tokens=8 is less than one block", eval_tokens=8)
    refused("training.batch_size=4 does not divide over 3 processes", 3)
    refused("training.micro_batch_size=4 does not divide the 2 sequences", 2, micro_batch_size=4)
    refused("unknown corpus 'tinystory'; did you mean 'tinystories'?", corpus="tinystory")
    refused("there is no file or folder of that name", corpus=str(tmp_path / "nowhere"))
    refused("corpus 'lambada' is for evaluation", corpus="lambada")
    (tmp_path / "short.txt").write_text("sixteen letters.")
    refused("is too short: 16 bytes, but one block", corpus=str(tmp_path / "short.txt"))


def test_the_refusals_have_classes_of_their_own(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    for name, kind in (("sdtlib", UnknownNameError), (str(tmp_path / "short.txt"), DataError)):
        with pytest.raises(kind):
            check_plan(dataclasses.replace(run_config(corpus), corpus=name), Processes())


def test_memory_above_the_devices_is_refused() -> None:
    held = memory(config("activations"))
    check_memory(held, held.peak, "this machine")
    check_memory(held, None, "this machine")
    with pytest.raises(ConfigError, match=r"needs about \d+ MiB.*this machine has \d+ MiB; lower"):
        check_memory(held, held.peak - 1, "this machine")
    with pytest.raises(ConfigError, match="in 2 processes"):
        check_memory(held, 2 * held.peak - 1, "this machine", 2)


def test_this_machines_memory_is_known_and_written_in_round_numbers() -> None:
    available = device_memory(cuda=False)
    assert available is not None
    assert available > 2**28
    assert (gib(3 * 2**29), gib(5 * 2**20)) == ("1.5 GiB", "5 MiB")
