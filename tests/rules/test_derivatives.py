"""Derivatives of one block, as a function of x, the streams and the rule's scalars.

The analysis needs Hessian-vector products and forward-mode Jacobians of every rule; attention
offers both in its plain form only (`SDPBackend.MATH`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jacfwd, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyak import ModelConfig, rules
from polyak.nn import attention
from polyak.nn.placement import placement_of
from polyak.nn.transformer import Block

every_rule = pytest.mark.parametrize("rule", rules.names())
Function = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def block_function(rule: str) -> tuple[Function, tuple[Tensor, ...]]:
    """A block as (x, streams…, scalars…) → (x, streams…), and inputs for it."""
    config = ModelConfig(rule=rule, num_heads=2, d_model=6, num_layers=1)
    block = Block(config, placement_of(config).layers[0], attention.get(config.attention)).double()
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    streams = block.rules["attention"].streams
    names = [name for name, _ in block.named_parameters() if name.endswith("_raw")]
    scalars = [block.get_parameter(name).detach() + 0.3 * torch.randn(1).item() for name in names]
    starts = [
        torch.rand_like(x) + 0.5 if stream.start == "ones" else 0.3 * torch.randn_like(x)
        for stream in streams
    ]
    for i, stream in enumerate(streams):
        if stream.start == "identity":
            starts[i] = 0.2 * torch.randn(1, 3, 3, 3, dtype=torch.float64)

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        values = {
            stream.name: _positive_definite(value) if stream.start == "identity" else value
            for stream, value in zip(streams, rest, strict=False)
        }
        state = block.rules["attention"].State(**values)
        scalars = dict(zip(names, rest[len(streams) :], strict=True))
        y, state = functional_call(block, scalars, (x, state))
        return (y, *state)

    inputs = tuple(value.requires_grad_() for value in (x, *starts, *scalars))
    return function, inputs


def _positive_definite(a: Tensor) -> Tensor:
    # such streams are second moments; a rule may rely on their symmetry
    return torch.eye(a.shape[-1], dtype=a.dtype) + a @ a.transpose(-2, -1)


@every_rule
def test_gradients_are_those_of_finite_differences(rule: str) -> None:
    function, inputs = block_function(rule)
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@every_rule
def test_second_derivatives_are_those_of_finite_differences(rule: str) -> None:
    function, inputs = block_function(rule)
    assert torch.autograd.gradgradcheck(
        function, inputs, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True
    )


@every_rule
def test_forward_and_reverse_mode_jacobians_agree(rule: str) -> None:
    function, inputs = block_function(rule)
    which = tuple(range(len(inputs)))
    reverse = jacrev(function, argnums=which)(*inputs)
    forward = jacfwd(function, argnums=which)(*inputs)
    for row_r, row_f in zip(reverse, forward, strict=True):
        for r, f in zip(row_r, row_f, strict=True):
            assert (r - f).abs().max() <= 1e-9 * max(1.0, float(r.detach().abs().max()))
