from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.training.config.training import TrainingConfig
from polyak.training.schedules import factor, in_decay

fractions = st.floats(0, 1)
TINYSTORIES = {"steps": 10_000, "warmup": 0.1, "decay_start": 0.83}
OPENWEBTEXT = {"steps": 30_000, "warmup": 0.1, "decay_start": 25 / 30}


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 300),
    bounds=st.tuples(fractions, fractions).map(sorted),
    final_rate=fractions,
    data=st.data(),
)
def test_every_schedule_is_its_closed_form(
    schedule: str, steps: int, bounds: list[float], final_rate: float, data: st.DataObject
) -> None:
    warmup, start = bounds
    config = TrainingConfig(
        schedule=schedule,  # type: ignore[arg-type]  # one of the choices
        steps=steps,
        warmup=warmup,
        decay_start=start,
        final_rate=final_rate,
    )
    step = data.draw(st.integers(0, steps - 1))
    w, s = round(warmup * steps), round(start * steps)
    decays = False
    if step < w:
        expected = step / w
    elif schedule == "cosine":
        phase = (step - w) / (steps - w)
        expected = final_rate + (1 - final_rate) * (1 + math.cos(math.pi * phase)) / 2
    elif schedule == "wsd" and step >= s:
        decays = True
        left = (steps - step) / (steps - s)
        expected = left * 1 + (1 - left) * final_rate
    else:
        expected = 1
    assert factor(step, config) == pytest.approx(expected, abs=1e-12)
    assert 0 <= factor(step, config) <= 1
    assert in_decay(step, config) is decays


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        (TINYSTORIES, {0: 0, 1: 1e-3, 500: 0.5, 999: 0.999, 1000: 1, 5500: 0.55, 10_000: 0.1}),
        (OPENWEBTEXT, {0: 0, 3: 1e-3, 1500: 0.5, 3000: 1, 16_500: 0.55, 30_000: 0.1}),
    ],
    ids=["tinystories", "openwebtext"],
)
def test_the_released_cosine_has_its_published_steps(
    recipe: dict[str, float], published: dict[int, float]
) -> None:
    config = TrainingConfig(**recipe)  # type: ignore[arg-type]  # whole steps, as annotated there
    assert {step: factor(step, config) for step in published} == pytest.approx(published)
    last = factor(config.steps - 1, config)
    assert 0.1 < last < 0.1 + 1e-7


@pytest.mark.parametrize(
    ("recipe", "first", "published"),
    [
        (TINYSTORIES, 8300, {500: 0.5, 1000: 1, 8300: 1, 9150: 0.55, 10_000: 0.1}),
        (OPENWEBTEXT, 25_000, {1500: 0.5, 3000: 1, 25_000: 1, 27_500: 0.55, 30_000: 0.1}),
    ],
    ids=["tinystories", "openwebtext"],
)
def test_the_released_wsd_decays_from_its_published_step(
    recipe: dict[str, float], first: int, published: dict[int, float]
) -> None:
    config = TrainingConfig(**recipe, schedule="wsd")  # type: ignore[arg-type]  # as above
    assert {step: factor(step, config) for step in published} == pytest.approx(published)
    decays = [step for step in range(config.steps) if in_decay(step, config)]
    assert decays == list(range(first, config.steps))
    below = [s for s in range(1 + round(0.1 * config.steps), config.steps) if factor(s, config) < 1]
    assert below == list(range(first + 1, config.steps))
    # one step of the line above its end, which is reached after the last step
    assert factor(config.steps - 1, config) == pytest.approx(0.1 + 0.9 / (config.steps - first))


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    config = TrainingConfig(schedule="constant", steps=100, warmup=0.1)
    assert [factor(step, config) for step in range(10)] == [step / 10 for step in range(10)]
    assert {factor(step, config) for step in range(10, 101)} == {1.0}
    assert not any(in_decay(step, config) for step in range(101))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_warm_up_starts_at_the_peak_and_one_step_is_enough(schedule: str) -> None:
    for steps in (1, 7):
        config = TrainingConfig(schedule=schedule, steps=steps, warmup=0)  # type: ignore[arg-type]
        assert factor(0, config) == 1


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_the_run_is_a_programmers_error(step: int) -> None:
    with pytest.raises(AssertionError, match=f"step {step} is not from 0 to 10"):
        factor(step, TrainingConfig(steps=10))


def test_schedules_need_no_torch() -> None:
    code = "import sys, polyak.training.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
