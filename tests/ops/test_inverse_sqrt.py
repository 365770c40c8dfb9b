"""The inverse square root's polynomial: its derivatives at symmetric R, and its rounding errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

from polyak.ops import gram_ema, inverse_sqrt_apply, inverse_sqrt_apply_reference

Op = Callable[[Tensor, Tensor], Tensor]


def symmetrised(op: Callable[..., Tensor], steps: int) -> Op:
    """The op as a function of a general R through (R + Rᵀ)/2."""
    return lambda m, r: op(m, 0.5 * (r + r.mT), steps)


def problem(n: int = 2, heads: int = 2, head_dim: int = 3, rows: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    m = torch.randn(n, heads, head_dim, dtype=torch.float64)
    a = torch.randn(n, rows or head_dim + 3, head_dim, dtype=torch.float64)
    return m, a.mT @ a


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# After two or three steps the polynomial still depends on n = ‖R'‖_F and every W differs from I;
# after ten, at these sizes, it has converged and neither would be tested.
STEPS = [1, 2, 3, 10]


@pytest.mark.parametrize("steps", STEPS)
@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 5), heads=st.integers(1, 7), head_dim=st.integers(1, 7), rows=st.integers(1, 9)
)
def test_value_and_gradients_are_those_of_the_reference(
    steps: int, n: int, heads: int, head_dim: int, rows: int
) -> None:
    m, r = problem(n, heads, head_dim, rows)
    cotangent = torch.randn_like(m)
    results = []
    for op in (inverse_sqrt_apply, inverse_sqrt_apply_reference):
        leaves = m.clone().requires_grad_(), r.clone().requires_grad_()
        value = symmetrised(op, steps)(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves, cotangent)])
    for fast, reference in zip(*results, strict=True):
        assert (fast - reference).abs().max() <= 1e-8 * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 3), (3, 2), (1, 1), (1, 3)])
def test_numerical_derivatives_of_first_and_second_order_agree(
    steps: int, heads: int, head_dim: int
) -> None:
    arguments = [a.requires_grad_() for a in problem(1, heads, head_dim)]
    op = symmetrised(inverse_sqrt_apply, steps)
    assert gradcheck(
        op,
        arguments,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(op, arguments, check_fwd_over_rev=True, check_batched_grad=True, atol=1e-4)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_first_and_second_derivatives_agree_in_every_order_of_modes(
    outer: Callable[..., Op], inner: Callable[..., Op]
) -> None:
    m, r = problem(n=2)
    weights = torch.randn_like(m)

    def scalar(op: Callable[..., Tensor]) -> Op:
        return lambda m, r: (symmetrised(op, 3)(m, r) * weights).sum()

    for i in (0, 1):
        fast = symmetrised(inverse_sqrt_apply, 3)
        reference = symmetrised(inverse_sqrt_apply_reference, 3)
        assert relative(inner(fast, i)(m, r), jacrev(reference, i)(m, r)) < 1e-10
        for j in (0, 1):
            actual = outer(inner(scalar(inverse_sqrt_apply), i), j)(m, r)
            expected = jacrev(jacrev(scalar(inverse_sqrt_apply_reference), i), j)(m, r)
            assert float((actual - expected).abs().max()) < 1e-10


def test_vmap_is_the_loop() -> None:
    m, r = problem(n=3)
    several = torch.stack([m, 2 * m, m - 1])
    tangents = torch.randn_like(m), r.mT @ r
    cotangent = torch.randn_like(m)

    def pushed(m: Tensor, r: Tensor) -> Tensor:
        return jvp(lambda m, r: inverse_sqrt_apply(m, r, 3), (m, r), tangents)[1]

    def pulled(m: Tensor, r: Tensor) -> Tensor:
        gradients = vjp(lambda m, r: inverse_sqrt_apply(m, r, 3), m, r)[1](cotangent)
        return torch.cat([g.flatten() for g in gradients])

    for function in (lambda m, r: inverse_sqrt_apply(m, r, 3), pushed, pulled):
        expected = torch.stack([function(x, r) for x in several])
        assert relative(vmap(function, (0, None))(several, r), expected) < 1e-12


def test_the_gradient_of_r_is_symmetric_and_broadcast_r_sums_over_tokens() -> None:
    m, r = problem(n=4)
    r = r[:1]
    leaf = r.clone().requires_grad_()
    inverse_sqrt_apply(m, leaf).sum().backward()
    other = r.clone().requires_grad_()
    inverse_sqrt_apply_reference(m, 0.5 * (other + other.mT)).sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    assert torch.equal(leaf.grad, leaf.grad.mT)
    assert relative(leaf.grad, other.grad) < 1e-10


def test_chunks_are_joined_in_order() -> None:
    # Enough tokens for several chunks and a shorter last one.
    m, r = problem(n=1100, heads=2, head_dim=16)
    cotangent = torch.randn_like(m)
    results = []
    for op in (inverse_sqrt_apply, inverse_sqrt_apply_reference):
        leaves = m.clone().requires_grad_(), r.clone().requires_grad_()
        value = op(*leaves)
        m_grad, r_grad = torch.autograd.grad(value, leaves, cotangent)
        results.append([value.detach(), m_grad, 0.5 * (r_grad + r_grad.mT)])
    for fast, reference in zip(*results, strict=True):
        assert relative(fast, reference) < 1e-9


def test_the_chain_of_moving_averages_has_the_reference_gradients() -> None:
    torch.manual_seed(0)
    beta = torch.tensor([0.4], dtype=torch.float64)
    g = torch.randn(3, 5, 2, 6, dtype=torch.float64)
    results = []
    for apply in (inverse_sqrt_apply, inverse_sqrt_apply_reference):
        leaves = beta.clone().requires_grad_(), g.clone().requires_grad_()
        r = torch.eye(6, dtype=torch.float64).expand(5, 6, 6)
        total = torch.zeros((), dtype=torch.float64)
        for layer in leaves[1]:
            r = gram_ema(leaves[0], r, layer)
            total = total + (apply(layer, r) ** 3).sum()
        results.append([total.detach(), *torch.autograd.grad(total, leaves)])
    for fast, reference in zip(*results, strict=True):
        assert relative(fast, reference) < 1e-10


def spectra(kind: str, n: int, head_dim: int) -> Tensor:
    if kind == "identity":
        return torch.eye(head_dim, dtype=torch.float64).repeat(n, 1, 1)
    if kind == "rank deficient":
        g = torch.randn(n, 6, head_dim, dtype=torch.float64)
        return g.mT @ g
    basis = torch.linalg.qr(torch.randn(n, head_dim, head_dim, dtype=torch.float64))[0]
    lowest = {"mild": -1.0, "wide": -8.0}[kind]
    values = torch.logspace(lowest, 1, head_dim, dtype=torch.float64)
    return basis @ (values[:, None] * basis.mT)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("identity", 1e-6), ("mild", 1e-5), ("rank deficient", 2e-4), ("wide", 2e-4)],
)
def test_single_precision_stays_near_the_double_precision_reference(
    kind: str, bound: float
) -> None:
    torch.manual_seed(0)
    # What single precision is given, it is given exactly.
    r = spectra(kind, 16, 64).float()
    r = 0.5 * (r + r.mT)
    m, cotangent = torch.randn(16, 6, 64), torch.randn(16, 6, 64)

    def run(op: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = m.to(dtype).requires_grad_(), r.to(dtype).requires_grad_()
        value = op(*leaves)
        m_grad, r_grad = torch.autograd.grad(value, leaves, cotangent.to(dtype))
        return [value.detach(), m_grad, 0.5 * (r_grad + r_grad.mT)]

    exact = run(inverse_sqrt_apply_reference, torch.float64)
    fast = run(inverse_sqrt_apply, torch.float32)
    assert max(map(relative, fast, exact)) < bound


def test_converged_r_gives_the_inverse_square_root() -> None:
    m, r = problem(n=3, head_dim=5, rows=20)
    values, vectors = torch.linalg.eigh(r + 1e-6 * torch.eye(5, dtype=torch.float64))
    expected = m @ (vectors * values.rsqrt()[:, None, :]) @ vectors.mT
    assert relative(inverse_sqrt_apply(m, r), expected) < 1e-10
