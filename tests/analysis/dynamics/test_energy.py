"""Interaction energies: attention with tied weights ascends its own, to first order exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyak import Transformer, rules
from polyak.analysis.dynamics.energy import applies, ascent, energy, log_energies
from polyak.analysis.dynamics.trajectory import Watched
from polyak.errors import ConfigError
from polyak.nn.presets import preset_fields

Build = Callable[..., Transformer]
T, D = 5, 4
FORMS = ("gradient_descent", "triple_momentum")
"""One rule that asks at x, one that asks ahead of it."""


def tied(x: Tensor) -> Tensor:
    """Causal softmax attention with identity weights, one head."""
    y = x[:, None]
    return F.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_energy_is_the_logarithm_of_the_softmax_s_denominator() -> None:
    x = drawn(2, T, D)
    scores = (x @ x.mT / math.sqrt(D)).tril().exp().tril()
    torch.testing.assert_close(log_energies(tied, x)[:, 0], scores.sum(-1).log())


def test_its_gradient_by_a_token_s_own_query_is_tied_attention() -> None:
    x = drawn(1, T, D)
    # the last token is nobody's key but its own
    others = torch.autograd.functional.jacobian(
        lambda last: torch.logsumexp(x[0, :-1] @ last / math.sqrt(D), 0), x[0, -1]
    )
    seen = torch.softmax(x[0, :-1] @ x[0, -1] / math.sqrt(D), 0) @ x[0, :-1] / math.sqrt(D)
    torch.testing.assert_close(others, seen)
    # and ∂S/∂y is the derivative of S
    direction = drawn(1, T, D)
    step = 1e-6
    rise = (
        log_energies(tied, x + step * direction).sum()
        - log_energies(tied, x - step * direction).sum()
    )
    assert float(rise) / (2 * step) == pytest.approx(
        float((ascent(tied, x) * direction).sum()), rel=1e-6
    )


@pytest.mark.parametrize(
    "fields",
    [
        *(
            pytest.param({"rule": name}, marks=() if name in FORMS else pytest.mark.slow)
            for name in rules.names()
        ),
        *(preset_fields(name, num_heads=2) for name in ("gpt2", "llama")),
        {"splitting": "simultaneous"},
        {"norm_position": "post"},
    ],
    ids=str,
)
def test_every_model_with_softmax_has_an_energy(
    fields: dict[str, Any], ids: Tensor, tiny: Build
) -> None:
    watched = Watched(tiny(**{"d_model": 4, **fields}))
    found = energy(watched, ids[:2, :4])
    attending = [n for n, label in enumerate(watched.labels) if n and not label.endswith("mlp")]
    assert {int(key.split("/")[0]) for key in found.numbers} == set(attending)
    for place in attending:
        own, null, excess = (
            found.numbers[f"{place}/{which}/rise"].mean for which in ("update", "random", "excess")
        )
        assert own is not None
        assert null is not None
        assert excess is not None
        assert excess.value == pytest.approx(own.value - null.value)
        share = found.numbers[f"{place}/update/rising"].mean
        assert share is not None
        assert 0 <= share.value <= 1


def test_a_step_along_the_gradient_rises_everywhere_on_average(ids: Tensor, tiny: Build) -> None:
    """With the oracle's answer replaced by a small multiple of ∂S/∂y, cosine is 1 and S rises."""
    watched = Watched(tiny())
    for block in watched.model.blocks:
        rule = block.rules["attention"]

        def step(
            x: Tensor,
            state: Any,
            oracle: Any,
            own: Any = rule.step,
            attention: Any = block.attention,
        ) -> Any:
            return x + 1e-4 * ascent(attention, x), own(x, state, oracle)[1]

        rule.step = step
    found = energy(watched, ids[:2, :4])
    for place in (1, 3):
        one, rise = (found.numbers[f"{place}/update/{n}"].mean for n in ("cosine", "rise"))
        assert one is not None
        assert rise is not None
        assert one.value == pytest.approx(1, abs=1e-9)
        assert rise.value > 0
        null = found.numbers[f"{place}/random/rise"].mean
        assert null is not None
        assert abs(null.value) < rise.value


def test_where_there_is_no_softmax_it_says_so(ids: Tensor, tiny: Build) -> None:
    watched = Watched(tiny(attention="linear"))
    assert "attention=linear" in str(applies(watched))
    with pytest.raises(ConfigError, match="does not apply here"):
        energy(watched, ids[:2, :4])
