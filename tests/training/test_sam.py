from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from polyak import ModelConfig, Transformer
from polyak.training.config.training import TrainingConfig
from polyak.training.sam import gradient_norm, perturbed, uses_sam

SIZE = {"num_layers": 2, "num_heads": 2, "d_model": 6, "vocab_size": 11, "context_length": 5}


def tiny(rule: str = "triple_momentum", **fields: Any) -> Transformer:
    model = Transformer(ModelConfig(rule=rule, **{**SIZE, **fields})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def backward(model: nn.Module, *batches: Tensor) -> None:
    for ids in batches:
        (loss_of(model, ids) / len(batches)).backward()


# Which steps


@given(step=st.integers(0, 99), start=st.floats(0.1, 1))
def test_sam_is_taken_never_always_or_in_the_decay_of_wsd(step: int, start: float) -> None:
    def used(sam: Any, **fields: Any) -> bool:
        return uses_sam(step, TrainingConfig(steps=100, sam=sam, decay_start=start, **fields))

    for schedule in ("cosine", "wsd", "constant"):
        assert not used("off", schedule=schedule)
        assert used("always", schedule=schedule)
    assert used("decay", schedule="wsd") is (step >= round(start * 100))


def test_sawd_takes_sam_on_the_last_sixth_of_the_published_run() -> None:
    config = TrainingConfig(steps=30_000, schedule="wsd", decay_start=25 / 30, sam="decay")
    steps = [step for step in range(30_000) if uses_sam(step, config)]
    assert steps == list(range(25_000, 30_000))
    assert 1 + len(steps) / 30_000 == pytest.approx(1.17, abs=0.005)  # the published compute


# The gradient


def test_the_gradient_is_that_of_a_hand_computation() -> None:
    # f(a, b) = ½ Σᵢ (aᵢ² bᵢ + cᵢ aᵢ): ∂a = a·b + c/2, ∂b = a²/2, in numpy
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 7))
    rho = 0.3

    def gradient(a: Any, b: Any) -> tuple[Any, Any]:
        return a * b + c / 2, a**2 / 2

    first = gradient(a, b)
    length = math.sqrt(sum((g**2).sum() for g in first))
    expected = gradient(a + rho * first[0] / length, b + rho * first[1] / length)

    weights = [nn.Parameter(torch.from_numpy(w.copy())) for w in (a, b)]

    def run() -> None:
        x, y = weights
        (0.5 * (x**2 * y + torch.from_numpy(c) * x)).sum().backward()

    run()
    with perturbed(weights, rho) as norm:
        assert all(weight.grad is None for weight in weights)
        run()
    assert norm == pytest.approx(length, rel=1e-14)
    for weight, want, start in zip(weights, expected, (a, b), strict=True):
        assert weight.grad is not None
        np.testing.assert_allclose(weight.grad.numpy(), want, rtol=1e-13)
        assert np.array_equal(weight.detach().numpy(), start)


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_model_moves_by_rho_along_one_global_direction(tied: bool) -> None:
    model = tiny(tie_embeddings=tied)
    names = [name for name, _ in model.named_parameters()]
    batches = torch.randint(11, (3, 2, 6)).unbind()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    backward(model, *batches)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(names)
    direction = torch.cat([g.flatten() for g in gradients])
    # given twice, as a tied weight is by modules that each list it
    with perturbed([*model.parameters(), *model.head.parameters()], 0.05) as norm:
        inside = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert norm == pytest.approx(float(direction.norm()), rel=1e-12)
    torch.testing.assert_close(inside - before, 0.05 * direction / direction.norm())
    assert float((inside - before).norm()) == pytest.approx(0.05, rel=1e-9)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    model = tiny()
    ids = torch.randint(11, (4, 6))
    found = []
    for batches in ([ids], list(ids.split(1))):
        backward(model, *batches)
        with perturbed(model.parameters(), 0.05):
            backward(model, *batches)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)
    backward(model, ids)
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    assert max(float((a - b).abs().max()) for a, b in zip(found[0], plain, strict=True)) > 1e-4


def test_with_dropout_one_seed_gives_one_gradient() -> None:
    model = tiny(dropout=0.3).train()
    ids = torch.randint(11, (2, 6))
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        backward(model, ids)
        with perturbed(model.parameters(), 0.05):
            backward(model, ids)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# The weights afterwards


class Stopped(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [False, True], ids=["finished", "raised"])
def test_the_weights_come_back_bit_for_bit(dtype: torch.dtype, stop: bool) -> None:
    # far apart in size: adding and subtracting would not come back
    weights = [nn.Parameter((torch.randn(50) * 10.0**power).to(dtype)) for power in (-6, 0, 6)]
    for weight in weights:
        weight.grad = torch.randn(50).to(dtype)
    before = [(weight.detach().clone(), weight.data_ptr()) for weight in weights]
    gradients = [weight.grad for weight in weights]
    inside: list[Tensor] = []
    try:
        with perturbed(weights, 0.05):
            inside = [weight.detach().clone() for weight in weights]
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            if stop:
                raise Stopped
    except Stopped:
        assert stop
    assert not torch.equal(inside[0], before[0][0])
    drifted = False
    for weight, (start, place), moved, g in zip(weights, before, inside, gradients, strict=True):
        assert torch.equal(weight.detach(), start)
        assert weight.data_ptr() == place  # in place: whoever else holds the storage sees it
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.ones_like(weight))
        assert g is not None
        drifted |= not torch.equal(moved - (moved - start), start)
        drifted |= not torch.equal(moved.sub(g, alpha=0.05 / gradient_length(gradients)), start)
    assert drifted  # the check above could fail


def gradient_length(gradients: list[Tensor | None]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))


def test_a_zero_gradient_moves_nothing_and_divides_by_nothing() -> None:
    weight, unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    weight.grad = torch.zeros(4)
    before = weight.detach().clone()
    with perturbed([weight, unused], 0.05) as norm:
        assert norm == 0
        assert torch.equal(weight.detach(), before)
        assert weight.grad is None
        (weight * 3).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((4,), 3.0))
    assert unused.grad is None
    with perturbed([unused], 0.05) as norm:
        assert norm == 0


@pytest.mark.parametrize(
    "bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, math.inf], [3e38, 3e38]], ids=str
)
def test_a_gradient_norm_that_is_not_finite_stays_so(bad: list[float]) -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch.ones(2), torch.tensor(bad)
    with perturbed(weights, 0.05) as norm:
        assert not math.isfinite(norm)
        assert all(torch.equal(weight.detach(), torch.ones(2)) for weight in weights)
        assert weights[1].grad is not None
        assert torch.equal(weights[1].grad.nan_to_num(7.0), torch.tensor(bad).nan_to_num(7.0))
        sum(weight.sum() for weight in weights).backward()  # a caller that goes on regardless
    assert all(torch.equal(weight.detach(), torch.ones(2)) for weight in weights)
    assert not math.isfinite(torch.nn.utils.clip_grad_norm_(weights, 1.0))


def test_the_clipped_second_gradient_is_applied_at_the_first_weights() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64))
    sgd = torch.optim.SGD([weight], lr=0.1)
    start, rho = weight.detach().numpy().copy(), 0.5
    (weight**4).sum().backward()
    with perturbed([weight], rho):
        (weight**4).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 2.0)
    sgd.step()
    first = 4 * start**3
    second = 4 * (start + rho * first / np.linalg.norm(first)) ** 3
    clipped = second * 2.0 / np.linalg.norm(second)
    np.testing.assert_allclose(weight.detach().numpy(), start - 0.1 * clipped, rtol=1e-6)


def test_the_norm_of_no_gradients_is_zero() -> None:
    assert gradient_norm([nn.Parameter(torch.ones(3))]) == 0
