"""Newton–Schulz per token and per weight matrix: edge cases, scale, and rounding errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyak.ops import (
    newton_schulz,
    newton_schulz_reference,
    orthogonalize,
    orthogonalize_reference,
)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 5), (5, 3), (1, 4), (8, 8), (1, 1)])
def test_a_zero_matrix_gives_zero_and_the_reference_gradient(heads: int, head_dim: int) -> None:
    y = torch.zeros(2, heads, head_dim, dtype=torch.float64)
    y[1] = 1e-14  # below the clamp, where the norm takes no part either
    gradients = []
    for op in (newton_schulz, newton_schulz_reference):
        leaf = y.clone().requires_grad_()
        value = op(leaf)
        assert torch.equal(value[0], torch.zeros_like(value[0]))
        gradients.append(torch.autograd.grad(value.sum(), leaf)[0])
    assert torch.isfinite(gradients[0]).all()
    assert relative(*gradients) < 1e-12


def test_scale_and_rotation_of_the_input_pass_through() -> None:
    y = torch.randn(3, 4, 7, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    assert relative(newton_schulz(1000 * y), newton_schulz(y)) < 1e-12
    assert relative(newton_schulz(y @ rotation), newton_schulz(y) @ rotation) < 1e-12
    assert relative(newton_schulz(y.mT), newton_schulz(y).mT) < 1e-12


def test_singular_values_follow_the_quintic_one_by_one() -> None:
    y = torch.randn(3, 4, 7, dtype=torch.float64)
    left, values, right = torch.linalg.svd(y, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert relative(newton_schulz(y), left @ (values[..., None] * right)) < 1e-12


@pytest.mark.parametrize(("heads", "head_dim"), [(6, 64), (12, 64), (64, 6)])
def test_single_precision_stays_near_the_double_precision_reference(
    heads: int, head_dim: int
) -> None:
    y = torch.randn(32, heads, head_dim)
    cotangent = torch.randn_like(y)
    results = []
    for op, dtype in ((newton_schulz, torch.float32), (newton_schulz_reference, torch.float64)):
        leaf = y.to(dtype).requires_grad_()
        value = op(leaf)
        gradient = torch.autograd.grad(value, leaf, cotangent.to(dtype))[0]
        results.append([value.detach(), gradient])
    for fast, exact in zip(*results, strict=True):
        assert relative(fast, exact) < 2e-5


SHAPES = [
    pytest.param(rows * d, columns * d, id=f"{rows * d}x{columns * d}")
    for d in (128, 384)
    for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4))
] + [
    pytest.param(rows * 768, columns * 768, id=f"{rows * 768}x{columns * 768}", marks=slow)
    for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4))
    for slow in [pytest.mark.slow]
]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_orthogonalize_is_the_direct_formula(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, dtype=torch.float64)
    exact = orthogonalize_reference(x)
    assert relative(orthogonalize(x), exact) < 1e-12
    assert relative(orthogonalize(x.float()), orthogonalize_reference(x.float().double())) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("noise", [1e-4, 1e-7])
def test_orthogonalize_keeps_single_precision_when_nearly_rank_deficient(
    rows: int, columns: int, noise: float
) -> None:
    rank = min(rows, columns) // 8
    x = torch.randn(rows, rank) @ torch.randn(rank, columns) + noise * torch.randn(rows, columns)
    assert relative(orthogonalize(x), orthogonalize_reference(x.double())) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_orthogonalize_takes_any_number_of_steps_and_leading_dimensions(steps: int) -> None:
    for shape in ((2, 3, 4, 20), (2, 20, 4), (0, 4, 20), (5, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        exact = orthogonalize_reference(x, steps)
        assert orthogonalize(x, steps).shape == exact.shape
        if x.numel():
            assert relative(orthogonalize(x, steps), exact) < 1e-12


def test_orthogonalize_leaves_its_argument_and_autograd_alone() -> None:
    for shape in ((4, 20), (2, 4, 20), (20, 4)):
        x = torch.randn(shape, requires_grad=True)
        before = x.detach().clone()
        result = orthogonalize(x)
        assert not result.requires_grad
        assert torch.equal(x.detach(), before)
    assert torch.equal(orthogonalize(torch.zeros(4, 20)), torch.zeros(4, 20))


@pytest.mark.parametrize("shape", [(96, 32), (32, 32), (32, 128)])
def test_orthogonalize_agrees_with_torch_muon_up_to_bfloat16(shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    gradient = torch.randn(shape)
    weight.grad = gradient.clone()
    optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.95, nesterov=False)
    optimizer.step()
    ours = -orthogonalize(gradient) * max(1.0, shape[0] / shape[1]) ** 0.5
    # torch rounds every product to 8 bits: a few thousandths of each entry, ten times amplified.
    assert relative(weight.detach(), ours) < 0.05
    assert relative(weight.detach(), ours * 1.2) > 0.1
