from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import run_config
from torch import Tensor

from polyak import ModelConfig, Transformer, load_run
from polyak.data.prepare import Prepared, prepare
from polyak.errors import ConfigError, DivergedError, PolyakError, RuleError
from polyak.rules import UpdateRule
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig
from polyak.training.loop import run_settings, train
from polyak.training.runs.folder import RunFolder
from polyak.training.trainer import (
    Trainer,
    device_of,
    precision,
    to_tensor,
    validation_loss,
    validation_set,
)

CPU = torch.device("cpu")


def data_of(config: RunConfig) -> Prepared:
    return prepare(config.corpus, config.tokenizer)


def trainer(corpus: Path, rule: str = "triple_momentum", **fields: Any) -> Trainer:
    config = run_config(corpus, rule, **fields)
    return Trainer(config, data_of(config))


def gradients_of_one_step(found: Trainer) -> tuple[float, float, list[Tensor]]:
    """(loss, norm, gradients after clipping) of step 0, with the update left out."""
    found.optimizers.step = lambda factor: None  # type: ignore[method-assign]
    loss, norm = found.step(0)
    return loss, norm, [p.grad.clone() for p in found.parameters if p.grad is not None]


# One step


@pytest.mark.parametrize("micro", [None, 1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_the_mean_loss_however_the_batch_is_cut(
    corpus: Path, micro: int | None, tied: bool
) -> None:
    found = trainer(corpus, clip=1e9, micro_batch_size=micro, tie_embeddings=tied)
    batch = to_tensor(found.batches.batch(0), CPU)
    logits = found.model(batch[:, :-1])
    mean = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    expected = torch.autograd.grad(mean, found.parameters)
    loss, norm, gradients = gradients_of_one_step(found)
    assert loss == pytest.approx(float(mean.detach()), rel=1e-6)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)), 1e-5)
    assert len(gradients) == len(expected)
    for gradient, wanted in zip(gradients, expected, strict=True):
        # float32: sums over 64 tokens in another order; a scalar's nearly cancel, so that their
        # rounding is measured by the whole gradient
        assert (gradient - wanted).norm() <= 2e-6 * wanted.norm() + 2e-8 * norm


def test_weights_after_several_steps_hardly_depend_on_the_micro_batch(corpus: Path) -> None:
    found = [trainer(corpus, steps=6, micro_batch_size=micro) for micro in (4, 1)]
    for step in range(4):
        for each in found:
            each.step(step)
    whole, cut = ([p.detach() for p in each.parameters] for each in found)
    start = [p.detach() for p in trainer(corpus).parameters]
    for a, b, s in zip(whole, cut, start, strict=True):
        # a scalar may have gone forth and back: its path is longer than the way that is left
        assert (a - b).norm() <= 1e-3 * (a - s).norm() + 1e-6


def test_large_gradients_are_scaled_to_the_clip_and_small_ones_left_alone(corpus: Path) -> None:
    _, norm, free = gradients_of_one_step(trainer(corpus, clip=1e9))
    total = math.sqrt(sum(float(g.square().sum()) for g in free))
    assert norm == pytest.approx(total, rel=1e-5)
    _, clipped_norm, clipped = gradients_of_one_step(trainer(corpus, clip=norm / 4))
    assert clipped_norm == norm  # what is logged is the norm before clipping
    for a, b in zip(free, clipped, strict=True):
        torch.testing.assert_close(b, a / 4, rtol=1e-4, atol=1e-9)
    _, _, untouched = gradients_of_one_step(trainer(corpus, clip=norm * 1.01))
    assert all(torch.equal(a, b) for a, b in zip(free, untouched, strict=True))


def test_the_first_step_of_a_warmup_moves_nothing(corpus: Path) -> None:
    found = trainer(corpus, steps=20)
    before = [p.detach().clone() for p in found.parameters]
    found.step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, found.parameters, strict=True))
    found.step(1)
    assert not any(torch.equal(a, b) for a, b in zip(before, found.parameters, strict=True))


# Determinism, dropout and validation


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(folder).metrics()]


def test_the_same_seed_repeats_every_bit_and_another_does_not(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(run_config(corpus, "adam", seed=seed, dropout=0.1), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert all(x != y for x, y in zip(losses(tmp_path / "a"), losses(tmp_path / "c"), strict=True))


def test_dropout_acts_in_training_only(corpus: Path) -> None:
    config = run_config(corpus, "nesterov", dropout=0.5)
    data = data_of(config)
    found = Trainer(config, data)
    plain = Transformer(dataclasses.replace(config.model, dropout=0.0))
    plain.load_state_dict(found.model.state_dict())
    found.model.train()
    batches = validation_set(config, data)
    state = torch.get_rng_state()
    measured = validation_loss(found.model, batches, CPU)
    assert torch.equal(state, torch.get_rng_state())  # so validating often changes no run
    assert measured == validation_loss(plain, batches, CPU)
    assert found.model.training
    ids = torch.arange(16)[None]
    assert not torch.equal(found.model(ids), plain(ids))


def test_how_often_a_run_is_validated_does_not_change_it(corpus: Path, tmp_path: Path) -> None:
    ends = [
        train(run_config(corpus, dropout=0.2, eval_every=every), tmp_path / str(every))["loss"]
        for every in (1, 5)
    ]
    assert ends[0] == ends[1]


def test_the_validation_set_is_the_same_for_every_rule_seed_and_batch_size(corpus: Path) -> None:
    configs = [
        run_config(corpus),
        run_config(corpus, "shampoo", seed=9),
        run_config(corpus, batch_size=2, micro_batch_size=1, steps=99),
        run_config(corpus, d_model=32),
    ]
    data = data_of(configs[0])
    found = [
        run_settings(config, data, validation_set(config, data))["validation"] for config in configs
    ]
    assert found == found[:1] * len(configs)
    assert found[0]["tokens"] == 256


def test_validation_loss_is_the_mean_over_all_targets(corpus: Path) -> None:
    config = run_config(corpus)
    data = data_of(config)
    model = Trainer(config, data).model.eval()
    batches = validation_set(config, data)
    rows = torch.from_numpy(np.concatenate(list(batches)))
    with torch.no_grad():
        logits = model(rows[:, :-1]).double()
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert validation_loss(model, batches, CPU) == pytest.approx(float(expected), rel=1e-6)


# The log


def test_the_log_is_complete_and_in_order(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, "triple_momentum", steps=25, num_layers=2, eval_every=4)
    seen: list[dict[str, Any]] = []
    result = train(config, tmp_path, progress=seen.append)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train_rows = [row for row in rows if row["kind"] == "train"]
    checks = [row for row in rows if row["kind"] == "validation"]
    assert len(train_rows) + len(checks) == len(rows)
    assert [row["step"] for row in train_rows] == [10, 20, 25]
    assert [row["step"] for row in checks] == [4, 8, 12, 16, 20, 24, 25]
    assert [at["step"] for at in seen] == list(range(1, 26))
    for kind in (train_rows, checks):
        for key in ("step", "tokens", "flops", "seconds"):
            values = [row[key] for row in kind]
            assert values == sorted(values)
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * 16
        assert math.isfinite(row["loss"])
        assert row["scalars"].keys() == {"mu", "beta", "gamma", "nu"}
        for by_substep in row["scalars"].values():
            assert by_substep.keys() == {"attention", "mlp"}
            assert all(len(by_depth) == 2 for by_depth in by_substep.values())
    for row in train_rows:
        assert row["gradient_norm"] > 0
        assert row["tokens_per_second"] > 0
        assert row["rates"].keys() == {"matrices", "embeddings", "norms", "scalars"}
        assert row["rates"]["matrices"] / 0.02 == pytest.approx(row["rates"]["norms"] / 3e-3)
    # a row's training loss is the mean over the steps since the row before
    steps = [at["loss"] for at in seen]
    for row, (a, b) in zip(train_rows, ((0, 10), (10, 20), (20, 25)), strict=True):
        assert row["loss"] == pytest.approx(sum(steps[a:b]) / (b - a))
    assert result["loss"] == checks[-1]["loss"]
    assert result["tokens"] == 25 * 4 * 16
    assert result["steps"] == 25


def test_a_finished_run_is_not_run_again(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus)
    first = train(config, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert train(config, tmp_path) == first
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


# Failing


@pytest.mark.parametrize("rates", [{"adam_lr": 1e30}, {"muon_lr": 1e30}], ids=str)
def test_a_diverging_run_names_step_and_rule_and_is_not_finished(
    corpus: Path, tmp_path: Path, rates: dict[str, float]
) -> None:
    config = run_config(corpus, "heavy_ball", steps=30, norm_eps=0.0, **rates)
    with pytest.raises(DivergedError, match=r"heavy_ball diverged: .* step \d+ .*lower") as caught:
        train(config, tmp_path)
    assert "\n" not in str(caught.value)
    run = RunFolder(tmp_path)
    assert run.result() is None
    assert all(math.isfinite(row["loss"]) for row in run.metrics())
    with pytest.raises(PolyakError, match="did not finish"):
        load_run(tmp_path)


def test_a_rule_that_turns_nan_leaves_the_weights_as_they_were(
    corpus: Path, registered: Callable[[str, type[UpdateRule]], str]
) -> None:
    class Late(UpdateRule):
        broken = False

        def step(self, x: Tensor, state: Any, oracle: Any) -> tuple[Tensor, Any]:
            return x + oracle(x) * (math.nan if self.broken else 1.0), state

    found = trainer(corpus, registered("late", Late), warmup=0.0)
    found.step(0)
    before = [p.detach().clone() for p in found.parameters]
    Late.broken = True
    with pytest.raises(
        DivergedError, match=r"rule late diverged: the loss .* at step 2 \(seed 0\)"
    ):
        found.step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, found.parameters, strict=True))


def broken_rules() -> dict[str, tuple[Any, str]]:
    class State2:
        v = torch.zeros(1)

    return {
        "x alone": (lambda x, state, oracle: x + oracle(x), "it returns a Tensor"),
        "nothing": (lambda x, state, oracle: None, "it returns nothing"),
        "three": (lambda x, state, oracle: (x, state, x), "it returns 3 values"),
        "shape": (lambda x, state, oracle: (x[..., :8], state), r"its x is of shape \(2, 1, 8\)"),
        "dtype": (lambda x, state, oracle: (x.double(), state), "its x is torch.float64"),
        "no tensor": (lambda x, state, oracle: (0.0, state), "its x is a float"),
        "state": (lambda x, state, oracle: (x, State2()), "its state is a State2"),
        "stream": (
            lambda x, state, oracle: (x, state.replace(v=state.v.sum())),
            r"its state.v is of shape \(\)",
        ),
        "raises": (lambda x, state, oracle: 1 // 0, "its step fails: ZeroDivisionError"),
    }


@pytest.mark.parametrize("mistake", broken_rules())
def test_a_step_that_returns_the_wrong_thing_is_told_in_one_line(
    corpus: Path, mistake: str, registered: Callable[[str, type[UpdateRule]], str]
) -> None:
    from polyak.rules import Stream

    step, said = broken_rules()[mistake]

    class Broken(UpdateRule):
        streams = (Stream("v", start="zeros"),)

        def step(self, x: Tensor, state: Any, oracle: Any) -> Any:
            return step(x, state, oracle)

    with pytest.raises(RuleError, match=rf"rule broken: .*{said}") as caught:
        trainer(corpus, registered("broken", Broken))
    assert "\n" not in str(caught.value)


def test_a_model_with_too_few_ids_for_the_tokenizer_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=100 is smaller than the 256 tokens"):
        trainer(corpus, vocab_size=100)


def test_a_validation_set_below_one_block_names_the_setting(corpus: Path) -> None:
    config = run_config(corpus, eval_tokens=15)
    with pytest.raises(ConfigError, match="eval_tokens=15 is less than one block"):
        validation_set(config, data_of(config))


# Recipe


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", -1),
        ("seed", -1),
        ("micro_batch_size", 3),
        ("eval_every", 0),
        ("muon_lr", -1.0),
        ("adam_lr", math.nan),
        ("scalar_lr", math.inf),
        ("warmup", 1.5),
        ("final_rate", -0.1),
        ("muon_momentum", 1.0),
        ("adam_betas", (0.9,)),
        ("adam_betas", (0.9, 1.0)),
        ("clip", 0),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainingConfig(**{field: value})


def test_configurations_survive_json(corpus: Path) -> None:
    config = run_config(corpus, "nesterov", rule_options={"frozen": ["mu"]}, adam_betas=(0.8, 0.9))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"'step'; did you mean 'steps'"):
        TrainingConfig.from_dict({"step": 3})
    assert ModelConfig.from_dict(config.model.to_dict()) == config.model


# Precision


def test_the_cpu_trains_in_float32() -> None:
    assert device_of("cpu") == CPU
    assert isinstance(precision(CPU), nullcontext)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='cuda': torch sees no CUDA device"):
        device_of("cuda")
    assert device_of("auto") == CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bfloat16 autocast is for CUDA only")
def test_cuda_trains_under_bfloat16_autocast_with_float32_weights(corpus: Path) -> None:
    config = dataclasses.replace(run_config(corpus), device="cuda")
    found = Trainer(config, data_of(config))
    with precision(found.device):
        assert found.model(torch.zeros(1, 4, dtype=torch.int64).cuda()).dtype == torch.bfloat16
    loss, norm = found.step(0)
    assert math.isfinite(loss)
    assert math.isfinite(norm)
    assert all(p.dtype == torch.float32 for p in found.parameters)


def test_the_standard_library_is_a_corpus_of_bytes(tmp_path: Path) -> None:
    config = dataclasses.replace(run_config(tmp_path, "adam", steps=2), corpus="stdlib")
    result = train(config, tmp_path / "run")
    assert 4 < result["loss"] < 6.5  # near ln 256: two steps teach little
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["corpus"]["name"] == "stdlib"


def test_files_left_out_of_the_corpus_are_said_and_kept_in_the_run(tmp_path: Path) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    for number in range(20):
        end = "é" if number % 5 < 2 else ""
        text = f"a letter about the garden, {number}{end}\n" * 40
        (letters / f"{number:02d}.txt").write_bytes(text.encode("latin-1"))
    config = run_config(letters, steps=1)
    with pytest.warns(UserWarning, match=r"'letters': 8 not UTF-8 \(00.txt, 01.txt, 05.txt, …\)"):
        train(config, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["skipped_files"]
    assert kept == {"not UTF-8": {"files": 8, "first": ["00.txt", "01.txt", "05.txt"]}}
    train(dataclasses.replace(config, encoding="latin-1"), tmp_path / "all")
    recorded = json.loads((tmp_path / "all" / "run.json").read_text())
    assert "skipped_files" not in recorded
    assert recorded["config"]["encoding"] == "latin-1"
