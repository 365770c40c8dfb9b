"""When flash-linear-attention's kernels are used, and that they compute what the walk does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyak import ops
from polyak.errors import ConfigError
from polyak.ops.attention import fla_kernels
from polyak.ops.attention.fla_kernels import INSTALLED, kernels_serve, same_function
from polyak.ops.attention.options import settings_of

BF16, F32 = torch.bfloat16, torch.float32
MASK = torch.ones(1, 4, dtype=torch.bool)

GOOD: dict[str, Any] = {
    "installed": True,
    "device": "cuda",
    "dtypes": {BF16},
    "widths": (64, 32),
    "options": settings_of({}),
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtypes": {torch.float16}},
        {"widths": (16, 256)},
        {"options": settings_of({"normalize": False, "scale": "head_dim"})},
        {"options": settings_of({"feature_map": "softplus", "eps": 0.1})},
        {"options": settings_of({"chunk_size": 16, "recompute": True})},  # change no result
    ],
    ids=str,
)
def test_the_kernels_serve_what_they_compute(change: dict[str, Any]) -> None:
    assert same_function(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"installed": False},
        {"device": "cpu"},
        {"dtypes": {F32}},
        {"dtypes": {torch.float64}},
        {"dtypes": {BF16, F32}},
        {"widths": (8, 64)},
        {"widths": (64, 33)},
        {"widths": (512, 64)},
        {"options": settings_of({"key_mask": MASK})},
        {"options": settings_of({"document_starts": MASK})},
        {"options": settings_of({"weighted_normalizer": True})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_is_the_walks(change: dict[str, Any]) -> None:
    assert not same_function(**{**GOOD, **change})


def test_tensors_of_this_processor_and_transforms_are_the_walks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 4, 1, 16, dtype=BF16)
    assert not kernels_serve(x, x, x, settings_of({}))
    monkeypatch.setattr(fla_kernels, "same_function", lambda *given: True)
    assert kernels_serve(x, x, x, settings_of({}))
    seen: list[bool] = []

    def tried(q: Tensor) -> Tensor:
        seen.append(kernels_serve(q, x, x, settings_of({})))
        return q.sum()

    torch.func.grad(tried)(x)
    assert seen == [False]


def test_a_gradient_of_the_gradient_is_refused_in_one_line() -> None:
    x = torch.randn(3, requires_grad=True)
    y = fla_kernels._Once.apply(x)  # type: ignore[no-untyped-call]
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(slope, torch.ones(3))
    with pytest.raises(ConfigError, match="no gradient of their gradient; compute in float32, or"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.skipif(not INSTALLED, reason="needs the extra [fla]")
@pytest.mark.parametrize(
    "options", [{}, {"normalize": False, "scale": "head_dim"}, {"feature_map": "softplus"}], ids=str
)
@pytest.mark.parametrize("tokens", [1, 100, 256])
def test_the_kernels_are_the_quadratic_form_in_value_and_gradient(
    tokens: int, options: dict[str, Any]
) -> None:
    inputs = [
        torch.randn(2, tokens, heads, 32, device="cuda").to(BF16).requires_grad_()
        for heads in (4, 2, 2)
    ]
    before = ops.AttentionState(torch.rand(2, 2, 32, 32).cuda(), None, torch.rand(2, 2, 32).cuda())
    assert kernels_serve(*inputs, settings_of(options))  # type: ignore[call-arg, arg-type]

    def found(dtype: torch.dtype) -> list[Tensor]:
        given = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out, after = ops.linear_attention_with_state(*given, before, **options)  # type: ignore[arg-type]
        loss = out.double().square().sum() + after.S.double().square().sum()
        return [out, after.S, after.Z, *torch.autograd.grad(loss, given)]

    kernels = found(BF16)
    with ops.reference_forms():
        exact = found(torch.float64)
    for one, other in zip(kernels, exact, strict=True):
        assert (one.double() - other).norm() <= 0.02 * other.norm()
