"""Every fast op is its reference, as a function and in all its derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from polyak import ops
from polyak.ops import PAIRS, Pair

DIFFERENTIABLE = [
    pytest.param(pair, id=pair.name)
    for pair in PAIRS
    if pair.differentiable and pair.name != "inverse_sqrt_apply"
]
"""inverse_sqrt_apply takes a symmetric R, which general perturbations leave: a file of its own."""

Transform = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def inputs(pair: Pair, n: int = 2, heads: int = 2, head_dim: int = 3) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return pair.make_inputs(n, heads, head_dim, torch.float64)


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def value_and_gradients(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...], cotangent: Tensor
) -> list[Tensor]:
    leaves = [a.detach().clone().requires_grad_() for a in arguments]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, cotangent)]


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 5), heads=st.integers(1, 9), head_dim=st.integers(1, 9))
def test_value_and_gradients_are_those_of_the_reference(
    pair: Pair, n: int, heads: int, head_dim: int
) -> None:
    arguments = inputs(pair, n, heads, head_dim)
    cotangent = torch.randn_like(pair.reference(*arguments))
    fast = value_and_gradients(pair.fast, arguments, cotangent)
    reference = value_and_gradients(pair.reference, arguments, cotangent)
    # A layer norm over one number divides 0 by √eps: its gradient is all cancellation.
    bound = 1e-6 if heads * head_dim == 1 else 1e-9
    assert max(map(relative, fast, reference)) < bound


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
def test_leading_dimensions_only_batch(pair: Pair) -> None:
    arguments = inputs(pair, n=10)
    expected = pair.fast(*arguments)
    folded = pair.fast(*(a.unflatten(0, (2, 5)) if a.shape[0] == 10 else a for a in arguments))
    assert relative(folded.flatten(0, 1), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pair", [pytest.param(p, id=p.name) for p in PAIRS if p.differentiable])
def test_a_token_depends_on_itself_alone_to_the_last_bit(pair: Pair, dtype: torch.dtype) -> None:
    # Models are causal to the last bit only if every op is: what the rest of a batch holds, be it
    # converged, huge or not a number, must not choose how the first three tokens are computed.
    torch.manual_seed(0)
    arguments = pair.make_inputs(12, 2, 5, dtype)
    cotangent = torch.randn_like(pair.fast(*arguments))
    own = [i for i, a in enumerate(arguments) if a.shape[0] == 12]

    def kept(factor: float) -> list[Tensor]:
        changed = [a.clone() for a in arguments]
        for i in own:
            changed[i][3:] *= factor
        value, *gradients = value_and_gradients(pair.fast, tuple(changed), cotangent)
        return [value[:3], *(gradients[i][:3] for i in own)]

    expected = kept(1.0)
    for factor in (1e-3, 60.0, 0.0, torch.nan):
        assert all(map(torch.equal, kept(factor), expected)), factor


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
def test_numerical_derivatives_of_first_and_second_order_agree(pair: Pair) -> None:
    arguments = [a.requires_grad_() for a in inputs(pair, n=1)]
    assert gradcheck(
        pair.fast,
        arguments,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(
        pair.fast, arguments, check_fwd_over_rev=True, check_batched_grad=True, atol=1e-4
    )


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
def test_jacobians_agree_in_both_modes(pair: Pair) -> None:
    arguments = inputs(pair)
    for i in range(len(arguments)):
        expected = jacrev(pair.reference, i)(*arguments)
        assert relative(jacrev(pair.fast, i)(*arguments), expected) < 1e-9
        assert relative(jacfwd(pair.fast, i)(*arguments), expected) < 1e-9


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_second_derivatives_agree_in_every_order_of_modes(
    pair: Pair, outer: Transform, inner: Transform
) -> None:
    arguments = inputs(pair, n=1)
    weights = torch.randn_like(pair.reference(*arguments))
    every = tuple(range(len(arguments)))

    def hessian(function: Callable[..., Tensor], outer: Transform, inner: Transform) -> Tensor:
        def scalar(*a: Tensor) -> Tensor:
            return (function(*a) * weights).sum()

        blocks = outer(inner(scalar, every), every)(*arguments)  # type: ignore[call-arg]
        return torch.cat([block.flatten() for row in blocks for block in row])

    expected = hessian(pair.reference, jacrev, jacrev)
    assert relative(hessian(pair.fast, outer, inner), expected) < 1e-8


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
def test_forward_mode_is_the_finite_difference(pair: Pair) -> None:
    arguments = inputs(pair)
    tangents = tuple(torch.randn_like(a) for a in arguments)
    _, derivative = jvp(pair.fast, arguments, tangents)
    h = 1e-6
    ahead = pair.fast(*(a + h * t for a, t in zip(arguments, tangents, strict=True)))
    behind = pair.fast(*(a - h * t for a, t in zip(arguments, tangents, strict=True)))
    assert relative(derivative, (ahead - behind) / (2 * h)) < 1e-6


@pytest.mark.parametrize("pair", DIFFERENTIABLE)
def test_vmap_over_any_argument_is_the_loop(pair: Pair) -> None:
    arguments = inputs(pair)
    tangents = tuple(torch.randn_like(a) for a in arguments)
    cotangent = torch.randn_like(pair.reference(*arguments))
    for varied in (*range(len(arguments)), None):
        dims = tuple(0 if varied in (i, None) else None for i in range(len(arguments)))
        lanes = [
            tuple(a * s if d == 0 else a for a, d in zip(arguments, dims, strict=True))
            for s in (1.0, 1.1, 0.9)
        ]
        stacked = tuple(
            torch.stack([lane[i] for lane in lanes]) if d == 0 else a
            for i, (a, d) in enumerate(zip(arguments, dims, strict=True))
        )

        def value(*a: Tensor) -> Tensor:
            return pair.fast(*a)

        def pushed(*a: Tensor) -> Tensor:
            return jvp(pair.fast, a, tangents)[1]

        def pulled(*a: Tensor) -> Tensor:
            gradients = vjp(pair.fast, *a)[1](cotangent)
            return torch.cat([g.flatten() for g in gradients])

        for function in (value, pushed, pulled):
            expected = torch.stack([function(*lane) for lane in lanes])
            assert relative(vmap(function, dims)(*stacked), expected) < 1e-9


def test_nested_vmap_is_two_loops() -> None:
    torch.manual_seed(0)
    y = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64)
    expected = ops.newton_schulz_reference(y)
    assert relative(vmap(vmap(ops.newton_schulz))(y), expected) < 1e-12
    inner = vmap(vmap(ops.newton_schulz, in_dims=1, out_dims=1), in_dims=2, out_dims=2)
    assert relative(inner(y), expected) < 1e-12


def test_third_derivatives_of_the_layer_norms_agree() -> None:
    # torch's own layer norm is wrong here without a word (pytorch issue 175754).
    u, weight, bias = inputs(next(p for p in PAIRS if p.name == "layer_norm"), n=1)

    def third(function: Callable[..., Tensor]) -> Tensor:
        def scalar(u: Tensor) -> Tensor:
            return (function(u, weight, bias, 1e-5) ** 3).sum()

        return jacrev(lambda u: (jacrev(grad(scalar))(u) ** 2).sum())(u)

    assert relative(third(ops.layer_norm), third(ops.layer_norm_reference)) < 1e-9


@pytest.mark.parametrize("pair", [pytest.param(pair, id=pair.name) for pair in PAIRS])
def test_the_switch_selects_the_reference_and_is_undone(pair: Pair) -> None:
    arguments = inputs(pair)
    expected = pair.reference(*arguments)
    assert not ops.using_reference_forms()
    with ops.reference_forms():
        assert torch.equal(pair.fast(*arguments), expected)
        with ops.reference_forms():
            pass
        assert ops.using_reference_forms()
    assert not ops.using_reference_forms()


def test_the_switch_is_undone_after_an_error() -> None:
    def fail() -> None:
        with ops.reference_forms():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not ops.using_reference_forms()


@pytest.mark.parametrize("pair", [pytest.param(pair, id=pair.name) for pair in PAIRS])
def test_meta_tensors_give_shapes_without_data(pair: Pair) -> None:
    arguments = inputs(pair)
    expected = pair.reference(*arguments)
    on_meta = [a.to("meta").requires_grad_(pair.differentiable) for a in arguments]
    result = pair.fast(*on_meta)
    assert result.device.type == "meta"
    assert result.shape == expected.shape
    if pair.differentiable:
        result.sum().backward()
        assert all(a.grad is not None and a.grad.shape == a.shape for a in on_meta)


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 5), (9, 12), (12, 3), (1, 1), (8, 8)])
@pytest.mark.parametrize("op", ["newton_schulz", "gram_ema", "inverse_sqrt_apply"])
def test_flop_formulas_are_the_meta_count(op: str, heads: int, head_dim: int) -> None:
    tokens = 7
    pair = next(p for p in PAIRS if p.name == op)
    arguments = [
        a.to("meta").requires_grad_()
        for a in pair.make_inputs(tokens, heads, head_dim, torch.float)
    ]
    with FlopCounterMode(display=False) as forward:
        result = pair.fast(*arguments)
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    expected = getattr(ops, f"{op}_flops")(heads, head_dim)
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(
        tokens * count for count in expected
    )


@pytest.mark.parametrize("op", ["newton_schulz", "inverse_sqrt_apply", "gram_ema"])
def test_autocast_does_not_round_the_matrix_ops(op: str) -> None:
    pair = next(p for p in PAIRS if p.name == op)
    torch.manual_seed(0)
    arguments = pair.make_inputs(3, 4, 9, torch.float32)
    expected = pair.fast(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pair.fast(*arguments), expected)


def test_blocks_of_rows_are_joined_in_order() -> None:
    pair = next(p for p in PAIRS if p.name == "momentum_norm")
    torch.manual_seed(0)
    arguments = pair.make_inputs(5000, 4, 16, torch.float64)  # several blocks and a shorter one
    cotangent = torch.randn_like(arguments[1])
    fast = value_and_gradients(pair.fast, arguments, cotangent)
    reference = value_and_gradients(pair.reference, arguments, cotangent)
    assert max(map(relative, fast, reference)) < 1e-9


def test_single_precision_keeps_the_tiny_gradient_of_gamma_at_zero_velocity() -> None:
    # LN(γg) hardly depends on γ, so γ's gradient is what is left after everything cancels.
    pair = next(p for p in PAIRS if p.name == "momentum_norm")
    torch.manual_seed(0)
    beta, v, gamma, g, weight, bias = pair.make_inputs(64, 4, 16, torch.float32)
    arguments = (beta, torch.zeros_like(v), gamma, g, weight, bias)
    cotangent = torch.randn_like(v)
    fast = value_and_gradients(pair.fast, arguments, cotangent)
    doubled = tuple(a.double() for a in arguments)
    exact = value_and_gradients(pair.reference, doubled, cotangent.double())
    assert abs(float(fast[3] / exact[3]) - 1) < 1e-3


@pytest.mark.parametrize("gamma", [0.05, 0.7, 20.0])
def test_momentum_norm_at_any_size_of_gamma_has_the_gradients_of_the_reference(
    gamma: float,
) -> None:
    # small γ takes another form: the fast one divides by it
    pair = next(p for p in PAIRS if p.name == "momentum_norm")
    beta, v, _, g, weight, bias = inputs(pair, n=3)
    arguments = (beta, v, torch.full_like(beta, gamma), 0.01 * g, weight, bias)
    cotangent = torch.randn_like(v)

    def gradients_of_gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        first = torch.autograd.grad(function(*leaves), leaves, cotangent, create_graph=True)
        cubes = torch.stack([(slope**3).sum() for slope in first]).sum()
        return [*first, *torch.autograd.grad(cubes, leaves[:-1])]

    fast, reference = (
        [slope.detach() for slope in gradients_of_gradients(form)]
        for form in (pair.fast, pair.reference)
    )
    assert max(map(relative, fast, reference)) < 1e-8


def test_momentum_norm_can_be_gone_back_through_twice() -> None:
    pair = next(p for p in PAIRS if p.name == "momentum_norm")
    leaves = [a.requires_grad_() for a in inputs(pair, n=3)]
    value = pair.fast(*leaves)
    cotangent = torch.randn_like(value)
    first = torch.autograd.grad(value, leaves, cotangent, retain_graph=True)
    second = torch.autograd.grad(value, leaves, cotangent)
    assert all(map(torch.equal, first, second))
