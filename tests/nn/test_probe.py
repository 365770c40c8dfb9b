"""What a rule must keep is tried before training: leaks of every kind are found, no more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import answer
from torch import Tensor

from polyak import ModelConfig, rules
from polyak.errors import RuleError
from polyak.nn import attention
from polyak.nn.attention._base import Attention
from polyak.nn.probe import probe
from polyak.rules import Oracle, State, UpdateRule, unconstrained, unit_interval

Register = Callable[[str, type[UpdateRule]], str]
Step = Callable[[Any, Tensor, State, Oracle], tuple[Tensor, State]]


def of(name: str, **fields: Any) -> ModelConfig:
    return ModelConfig(**{"rule": name, "context_length": 96, **fields})


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.parametrize(
    "backbone",
    [{}, {"positions": "rope", "norm": "rms", "splitting": "simultaneous", "num_kv_heads": 2}],
)
def test_every_registered_rule_passes(rule: str, backbone: dict[str, Any]) -> None:
    probe(of(rule, context_length=40, **backbone))


@pytest.mark.parametrize("kind", attention.names())
def test_every_kind_of_attention_passes(kind: str) -> None:
    assert issubclass(attention.get(kind), Attention)
    probe(of("triple_momentum", attention=kind))
    if not attention.get(kind).causal_only:
        probe(of("triple_momentum", attention=kind, causal=False))


def later(x: Tensor) -> Tensor:
    return torch.roll(x, -1, dims=1)


class Gate(UpdateRule):
    """What leaks is multiplied by a coefficient that starts at zero."""

    gain = unconstrained(0.0)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        return x + oracle(x) + self.gain * later(x), state


class OwnGate(UpdateRule):
    """The same behind a parameter of its own."""

    def __init__(self, d_model: int, num_heads: int, **given: Any) -> None:
        super().__init__(d_model, num_heads, **given)
        self.gate = torch.nn.Parameter(torch.zeros(d_model))

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        return x + oracle(x) + self.gate * later(x), state


def _training_only(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) + (1e-6 * later(x) if self.training else 0.0), state


def _evaluation_only(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) + (0.0 if self.training else later(x)), state


def _beyond_64(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    y = x + oracle(x)
    return torch.cat((y[:, :64], y[:, 64:] + later(y[:, 64:])), dim=1), state


def _mean_of_sequence(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) - x.mean(dim=1, keepdim=True), state


def _length(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) * x.shape[1], state


def _across_rows(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) - x.mean(dim=0, keepdim=True), state


def _place_in_batch(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    place = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None]
    return x + oracle(x) * (1 + place), state


def _row_count(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) / x.shape[0], state


def _memory(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    return x + oracle(x) * self.calls, state


def _python(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) * random.random(), state


def _numpy(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) * np.random.rand(), state


def _clock(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) * (time.time() % 1), state


def _generator(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    drawn = torch.rand((), generator=torch.Generator().manual_seed(time.time_ns()))
    return x + oracle(x) * drawn.to(x.dtype), state


def _overflow(self: Any, x: Tensor, state: State, oracle: Oracle) -> Any:
    return x + oracle(x) * ((x * 1e30).square() / 1e60).clamp(max=1), state


LEAKS: dict[str, tuple[Step, str]] = {
    "training": (_training_only, r"sees later tokens: .* by \d.*\(training mode, 2 tokens\)"),
    "evaluation": (_evaluation_only, r"sees later tokens: .*\(evaluation mode, 2 tokens\)"),
    "beyond 64": (_beyond_64, r"sees later tokens: .*\(training mode, 96 tokens\)"),
    "mean": (_mean_of_sequence, "sees later tokens"),
    "length": (_length, "sees how many tokens follow: the logits of 1 change by"),
    "rows": (_across_rows, "mixes the rows of a batch: .* when another row changes"),
    "place": (_place_in_batch, "mixes the rows of a batch: .* when rows change places"),
    "row count": (_row_count, "mixes the rows of a batch: .* when rows are joined"),
    "memory": (_memory, "gives other logits when run again with the same seed"),
    "random": (_python, "gives other logits when run again with the same seed"),
    "numpy": (_numpy, "gives other logits when run again with the same seed"),
    "clock": (_clock, "gives other logits when run again with the same seed"),
    "generator": (_generator, "gives other logits when run again with the same seed"),
    "overflow": (
        _overflow,
        r"gives logits that are not finite in float32 \(training mode, 96 tokens\)",
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_refused_in_one_line_with_its_size(leak: str, registered: Register) -> None:
    step, said = LEAKS[leak]
    rule = type("Leaking", (UpdateRule,), {"step": step})
    with pytest.raises(RuleError, match=f"rule leaking {said}") as caught:
        probe(of(registered("leaking", rule)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rule", [Gate, OwnGate])
def test_a_leak_does_not_hide_behind_a_coefficient_that_starts_at_zero(
    rule: type[UpdateRule], registered: Register
) -> None:
    with pytest.raises(RuleError, match="sees later tokens"):
        probe(of(registered("gate", rule)))


def test_what_is_frozen_stays_as_it_is(registered: Register) -> None:
    probe(of(registered("gate", Gate), rule_options={"frozen": ("gain",)}))


def test_an_encoder_may_see_later_tokens(registered: Register) -> None:
    probe(of(registered("gate", Gate), causal=False))


def test_numbers_that_the_seed_decides_may_be_drawn(registered: Register) -> None:
    class Noisy(UpdateRule):
        beta = unit_interval(0.5)

        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return x + oracle(x) + self.beta * torch.randn_like(x), state

    before = torch.get_rng_state()
    probe(of(registered("noisy", Noisy)))
    assert torch.equal(torch.get_rng_state(), before)

    class Leaking(Noisy):
        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return x + oracle(x) + self.beta * torch.randn_like(x) + 1e-3 * later(x), state

    with pytest.raises(RuleError, match="sees later tokens"):
        probe(of(registered("leaking", Leaking)))


def test_a_rule_for_one_width_is_tried_at_that_width(registered: Register) -> None:
    class Wide(UpdateRule):
        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            return x + oracle(x) * torch.ones(128, dtype=x.dtype), state

    probe(of(registered("wide", Wide)))


def test_the_command_line_checks_a_file(tmp_path: Path) -> None:
    (tmp_path / "shift.py").write_text(
        "import torch\nfrom polyak.rules import UpdateRule, unconstrained\n"
        "class Shift(UpdateRule):\n    gain = unconstrained(0.0)\n"
        "    def step(self, x, state, oracle):\n"
        "        return x + oracle(x) + self.gain * torch.roll(x, -1, dims=1), state\n"
    )
    words = ("rules", "--context-length", 32, "--check")
    done = answer(*words, "shift.py:Shift", cwd=tmp_path, cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("polyak rules: rule Shift sees later tokens: the logits at")
    assert done.stderr.count("\n") == 1
    done = answer(*words, "triple_momentum[mu=0.1]", cwd=tmp_path, cache=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("triple_momentum[mu=0.1]: no leak at 1, 2, 17, 32 tokens")
