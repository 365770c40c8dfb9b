"""Spikes of the loss, and what is not finite first."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_config
from torch import nn

from polyak.training.divergence import SPIKE_LEAST, SPIKE_WINDOW, SpikeDetector, first_bad_parameter
from polyak.training.loop import train
from polyak.training.trainer import Trainer


def falling(count: int, noise: float = 0.05) -> list[float]:
    draw = random.Random(1)
    return [6 * math.exp(-step / 60) + 2 + noise * draw.gauss(0, 1) for step in range(count)]


def test_a_falling_noisy_loss_has_no_spikes_and_a_jump_is_one() -> None:
    detector = SpikeDetector()
    assert [detector.see(loss) for loss in falling(300)] == [None] * 300
    usual = detector.see(4.0)
    assert usual is not None
    assert usual == pytest.approx(2.05, abs=0.1)
    assert detector.see(2.05) is None


def test_few_losses_tell_nothing_and_old_ones_are_forgotten() -> None:
    detector = SpikeDetector()
    assert all(detector.see(1.0) is None for _ in range(SPIKE_LEAST - 1))
    assert detector.see(100.0) is None
    for _ in range(SPIKE_WINDOW):
        detector.see(50.0)
    assert detector.see(50.05) is None  # no more than a tenth of a nat
    assert detector.see(50.2) == 50.0


def test_a_detector_goes_on_from_what_it_saved() -> None:
    losses = [*falling(80), 9.0, 2.0]
    whole, first = SpikeDetector(), SpikeDetector()
    seen = [whole.see(loss) for loss in losses]
    half = [first.see(loss) for loss in losses[:50]]
    second = SpikeDetector(json.loads(json.dumps(list(first.recent))))
    assert seen == half + [second.see(loss) for loss in losses[50:]]


def test_the_first_bad_weight_is_named_before_any_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert first_bad_parameter(model) is None
    model[0].weight.grad = torch.full((2, 2), math.nan)
    assert first_bad_parameter(model) == "gradient of 0.weight"
    with torch.no_grad():
        model[1].bias[0] = math.inf
    assert first_bad_parameter(model) == "weight 1.bias"


def test_a_spike_is_logged_and_training_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def jump(self: Trainer, number: int) -> tuple[float, float]:
        loss, norm = step(self, number)
        return loss + (5.0 if number == 30 else 0.0), norm

    monkeypatch.setattr(Trainer, "step", jump)
    train(run_config(corpus, steps=40), tmp_path)
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    [spike] = [row for row in rows if row["kind"] == "spike"]
    assert spike["step"] == 31
    assert spike["loss"] - spike["usual"] > 4
    assert rows[-1]["step"] == 40
