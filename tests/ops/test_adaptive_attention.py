"""Adaptive momentum attention where its coefficient is at an edge, and what its options mean."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak import ops
from polyak.errors import ConfigError
from polyak.ops import adaptive_momentum_attention as adaptive
from polyak.ops import adaptive_momentum_attention_recurrent as recurrent
from polyak.ops import adaptive_momentum_attention_with_state as with_state


def draw(
    tokens: int = 11, correlation: float = 0.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose neighbours have that correlation: the higher, the larger the coefficients."""
    torch.manual_seed(0)
    found = []
    for width in (4, 4, 5):
        x = torch.randn(2, tokens, 2, width, dtype=torch.float64)
        for t in range(1, tokens):
            x[:, t] = correlation * x[:, t - 1] + math.sqrt(1 - correlation**2) * x[:, t]
        found.append(x.to(dtype).requires_grad_())
    return found[0], found[1], found[2]


def value_and_gradients(op: Any, inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    out, state = op(*inputs, **options)
    torch.manual_seed(1)
    weights = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    loss = (out * weights).sum() + state.S.square().sum() + state.P.sum()
    return [out.detach(), *torch.autograd.grad(loss, inputs)]


def furthest(actual: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(
        float((a.detach().double() - e.detach()).abs().max() / e.abs().max()) for a, e in pairs
    )


def coefficients(inputs: tuple[Tensor, ...], **options: Any) -> Tensor:
    """The coefficients μ by the definition, from the states P of the recurrence, (T, B, H)."""
    state, found = None, []
    for t in range(inputs[0].shape[1]):
        token = [x[:, t].detach() for x in inputs]
        before = state
        _, state = ops.adaptive_momentum_attention_step(*token, state, **options)
        if before is not None:
            assert before.P is not None
            assert state.P is not None
            assert state.key is not None
            assert state.value is not None
            u = state.key[..., None] * state.value[..., None, :]
            rest = state.P + options["gamma"] * u  # mu P
            found.append((rest * before.P).sum((-1, -2)) / before.P.square().sum((-1, -2)))
    return torch.stack(found)


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("first_step", ["unit", "gamma"])
def test_chunks_are_the_recurrence_for_small_and_large_coefficients(
    correlation: float, first_step: str
) -> None:
    inputs = draw(70, correlation)
    options: dict[str, Any] = {"gamma": 0.6, "first_step": first_step}
    expected = value_and_gradients(recurrent, inputs, **options)
    for chunk_size in (1, 8, 33, 64):
        found = value_and_gradients(with_state, inputs, chunk_size=chunk_size, **options)
        assert furthest(found, expected) < 1e-12
    mean = float(coefficients(inputs, **options).mean())
    assert mean > {0.0: 0.01, 0.9: 0.05, 0.99: 0.3, 0.999: 0.5}[correlation]


def test_single_precision_is_close() -> None:
    for correlation in (0.0, 0.99):
        exact = draw(128, correlation)
        single = draw(128, correlation, torch.float32)
        expected = adaptive(*exact, gamma=0.6)
        assert furthest([adaptive(*single, gamma=0.6)], [expected]) < 1e-5


def test_every_coefficient_is_between_0_and_its_largest() -> None:
    found = coefficients(draw(40, 0.9), gamma=3.0)
    assert float(found.min()) >= -1e-12
    assert float(found.max()) <= 0.9999 + 1e-12
    assert float(found.max()) > 0.99  # a large change of U is also near 1


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_values_that_are_all_zero_give_zeros_and_finite_gradients(chunk_size: int) -> None:
    q, k, v = draw(9)
    v = torch.zeros_like(v).requires_grad_()
    out = adaptive(q, k, v, gamma=0.6, chunk_size=chunk_size)
    assert not out.any()
    found = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(recurrent(q, k, v, gamma=0.6)[0].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in found)
    assert torch.allclose(found[2], expected[2], rtol=1e-12, atol=1e-12)
    assert not found[0].any()


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_zeros_before_the_first_value_are_no_momentum(chunk_size: int) -> None:
    q, k, v = draw(9)
    v = torch.cat((torch.zeros_like(v[:, :3]), v[:, 3:]), dim=1).detach().requires_grad_()
    found = value_and_gradients(with_state, (q, k, v), gamma=0.6, chunk_size=chunk_size)
    assert all(g.isfinite().all() for g in found)
    assert furthest(found, value_and_gradients(recurrent, (q, k, v), gamma=0.6)) < 1e-12


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("op", [with_state, recurrent])
def test_a_token_that_repeats_has_the_largest_coefficient_and_no_gradient_through_it(
    factor: float, op: Any
) -> None:
    q, k, v = (x.detach().clone() for x in draw(6))
    k, v = k.exp(), v
    k[:, 3], v[:, 3] = factor * k[:, 2], v[:, 2] / factor  # the same U, also by other factors
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    options: dict[str, Any] = {"gamma": 0.6, "feature_map": "identity"}
    assert torch.allclose(
        coefficients(inputs, **options)[2], torch.tensor(0.9999, dtype=torch.float64)
    )
    found = value_and_gradients(op, inputs, **options)
    assert all(g.isfinite().all() for g in found)
    assert max(float(g.abs().max()) for g in found) < 1e5
    assert furthest(found, value_and_gradients(recurrent, inputs, **options)) < 1e-12


def test_with_a_consistent_first_step_gamma_only_scales() -> None:
    q, k, v = draw(20)
    one = adaptive(q, k, v, gamma=0.6, first_step="gamma")
    other = adaptive(q, k, v, gamma=1.7, first_step="gamma")
    assert furthest([other / 1.7], [one / 0.6]) < 1e-12
    assert furthest([adaptive(q, k, v, gamma=1.7) / 1.7], [one / 0.6]) > 1e-3


def test_gamma_per_head_is_each_head_with_its_own() -> None:
    q, k, v = draw(10)
    both = adaptive(q, k, v, gamma=torch.tensor([0.5, 2.0]), chunk_size=4)
    for head, gamma in enumerate((0.5, 2.0)):
        at = slice(head, head + 1)
        alone = adaptive(q[:, :, at], k[:, :, at], v[:, :, at], gamma=gamma, chunk_size=4)
        assert furthest([both[:, :, at]], [alone]) < 1e-12


def test_chunks_are_many_times_faster_than_tokens() -> None:
    q, k, v = (torch.randn(2, 256, 4, 32, requires_grad=True) for _ in range(3))

    def seconds(op: Any) -> float:
        began = time.process_time()
        out, _ = op(q, k, v, gamma=0.6, chunk_size=32)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        return time.process_time() - began

    seconds(with_state)
    assert 4 * min(seconds(with_state) for _ in range(3)) < seconds(recurrent)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_step": "units"}, "unknown first_step 'units'; did you mean 'unit'"),
        ({"weighted_normalizer": True}, "weighted_normalizer=True is not defined"),
        ({"gamma": -1.0}, "gamma=-1 must be positive"),
        ({"scale": "sqrt_length"}, "causal attention does not know the length"),
    ],
)
def test_a_mistake_is_one_clear_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        adaptive(*draw(), **{"gamma": 0.6, **options})
    assert "\n" not in str(caught.value)


def test_a_state_of_momentum_attention_is_refused() -> None:
    inputs = draw()
    _, state = ops.momentum_attention_with_state(*inputs, mu=0.5, gamma=1.0)
    with pytest.raises(ConfigError, match=r"state\.key is missing"):
        with_state(*inputs, state, gamma=0.6)
