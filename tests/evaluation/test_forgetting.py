"""Forgetting: against a loop written out by hand, repeatable, and without touching the run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import run_config

from polyak import Transformer
from polyak.data.batches import TrainBatches
from polyak.errors import ConfigError, DivergedError, PolyakError
from polyak.evaluation.config import ForgettingConfig
from polyak.evaluation.forgetting import experiment, forget
from polyak.evaluation.losses import token_losses
from polyak.evaluation.subjects import Subject, corpus_of, load_subject
from polyak.training.loop import train


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    return load_subject(run)


def config(other: Path, **fields: object) -> ForgettingConfig:
    small = {"steps": 12, "warmup": 3, "lr": 3e-3, "batch_size": 4, "eval_tokens": 256}
    return ForgettingConfig(onto=str(other), **{"device": "cpu", **small, **fields})  # type: ignore[arg-type]


def test_the_defaults_are_the_published_protocol_but_for_the_batch() -> None:
    recipe = ForgettingConfig(onto="prose").training()
    assert recipe.steps == 1000
    assert round(recipe.warmup * recipe.steps) == 50
    assert (recipe.optimizer, recipe.adam_lr, recipe.scalar_lr) == ("adamw", 1e-4, 1e-4)
    assert (recipe.weight_decay, recipe.adam_betas) == (0.01, (0.9, 0.95))
    assert (recipe.schedule, recipe.final_rate, recipe.sam) == ("cosine", 0.1, "off")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "momentum", "adaptive_momentum"])
def test_kinds_of_attention_with_a_state_forget_by_the_same_loop(
    kind: str, corpus: Path, other: Path, tmp_path: Path
) -> None:
    options = {} if kind == "linear" else {"gamma_learned": "head"}
    chosen = run_config(corpus, steps=8, attention=kind, attention_options=options)
    train(chosen, tmp_path / "run")
    check_by_hand(load_subject(tmp_path / "run"), other)


def test_it_is_adamw_on_the_other_corpus_written_out_by_hand(subject: Subject, other: Path) -> None:
    check_by_hand(subject, other)


def check_by_hand(subject: Subject, other: Path) -> None:
    chosen = config(other)
    found = forget(subject, str(other), chosen)
    assert isinstance(subject.model, Transformer)
    model = Transformer(subject.model.config)
    model.load_state_dict(subject.model.state_dict())
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.endswith("_raw")]
    kept = {id(p) for p in decayed}
    plain = [p for p in model.parameters() if id(p) not in kept]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = TrainBatches(corpus_of(subject, str(other)).train, 16, 4, 0)
    for step in range(12):
        ids = torch.from_numpy(batches.batch(step))
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = (step - 3) / 9
        rate = step / 3 if step < 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in adam.param_groups:
            group["lr"] = 3e-3 * rate
        adam.step()
        adam.zero_grad()
    after = dataclasses.replace(subject, model=model.eval())
    for side, corpus in (("source", None), ("target", str(other))):
        before = token_losses(subject, corpus, tokens=256).nats.mean()
        ended = token_losses(after, corpus, tokens=256).nats.mean()
        assert found[side]["before"]["loss"]["value"] == pytest.approx(before, abs=1e-12)
        assert found[side]["after"]["loss"]["value"] == pytest.approx(ended, abs=1e-5)
        change = found["forgetting"]["value"] if corpus is None else -found["plasticity"]["value"]
        assert change == pytest.approx(ended - before, abs=2e-5)
    assert found["plasticity"]["value"] > 0.05
    json.dumps(found, allow_nan=False)


def test_the_same_again_is_the_same_and_the_run_is_left_as_it_was(
    subject: Subject, other: Path
) -> None:
    files = {p: p.read_bytes() for p in subject.folder.rglob("*") if p.is_file()}
    weights = {name: value.clone() for name, value in subject.model.state_dict().items()}
    curves: list[int] = []
    first = forget(
        subject, str(other), config(other, eval_every=5), lambda m: curves.append(m["step"])
    )
    second = forget(subject, str(other), config(other, eval_every=5))
    assert first["curve"] == second["curve"]
    assert first["curve"]["step"] == [0, 5, 10, 12]
    assert curves == list(range(1, 13))
    assert files == {p: p.read_bytes() for p in subject.folder.rglob("*") if p.is_file()}
    assert all(torch.equal(weights[n], v) for n, v in subject.model.state_dict().items())
    assert not subject.model.training
    other_seed = forget(subject, str(other), config(other, seed=1))
    assert other_seed["forgetting"] != first["forgetting"]


def test_the_optimizer_is_a_choice_and_micro_batches_change_nothing(
    subject: Subject, other: Path
) -> None:
    adamw = forget(subject, str(other), config(other))
    parts = forget(subject, str(other), config(other, micro_batch_size=2))
    assert parts["forgetting"]["value"] == pytest.approx(adamw["forgetting"]["value"], abs=1e-5)
    muon = forget(subject, str(other), config(other, optimizer="muon", muon_lr=0.005))
    assert abs(muon["plasticity"]["value"] - adamw["plasticity"]["value"]) > 1e-3


def test_the_experiment_is_told_by_weights_corpora_and_protocol_alone(
    runs: Path, subject: Subject, other: Path, corpus: Path
) -> None:
    base = experiment(subject, config(other))
    assert base == experiment(subject, config(other, device="auto", out=Path("elsewhere")))
    changed = [
        experiment(load_subject(runs / "gradient_descent"), config(other)),
        experiment(subject, config(corpus)),
        *(
            experiment(subject, config(other, **{name: value}))
            for name, value in (("steps", 13), ("lr", 1e-3), ("optimizer", "muon"), ("seed", 1))
        ),
    ]
    assert base not in changed


def test_bad_input_is_one_line(subject: Subject, other: Path, tmp_path: Path, corpus: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a\nb\n" * 3)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    seeing = dataclasses.replace(
        subject, name="seer", model=Transformer(run_config(corpus, causal=False).model).eval()
    )
    for who, where, says in (
        (seeing, other, "seer is not causal"),
        (subject, short, "too short"),
        (subject, empty, "empty"),
        (subject, tmp_path / "nothing", "there is no file or folder of that name"),
    ):
        with pytest.raises(PolyakError, match=says) as caught:
            forget(who, str(where), config(other))
        assert "\n" not in str(caught.value)
    for fields, says in (
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"steps": 20, "warmup": 50}, "warmup=50 is longer than steps=20"),
        ({"lr": -1.0}, r"lr=-1\.0 must be a number of at least 0"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"batch_size": 6, "micro_batch_size": 4}, "does not divide"),
        ({"eval_tokens": 0}, "eval_tokens=0"),
    ):
        with pytest.raises(ConfigError, match=says):
            config(other, **fields)
    with pytest.raises(ConfigError, match="no corpus is named"):
        ForgettingConfig()
    with pytest.raises(DivergedError, match=r"is not finite at step \d+; lower lr=1e\+30"):
        forget(subject, str(other), config(other, lr=1e30, warmup=0))
