"""What the ops keep between forward and backward: their inputs, whatever the iteration count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polyak import ops
from polyak.ops import PAIRS


def saved_storages(function: Callable[..., Tensor], *arguments: Tensor) -> dict[int, int]:
    """Bytes of every distinct storage that the call's graph holds beside the result's own."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(*arguments)
    assert result.requires_grad
    held.pop(result.untyped_storage().data_ptr(), None)  # whoever uses the result holds it anyway
    return held


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, id=pair.name) for pair in PAIRS if pair.differentiable]
)
def test_no_more_is_saved_than_inputs_and_the_result(pair: ops.Pair) -> None:
    arguments = [a.requires_grad_() for a in pair.make_inputs(64, 4, 8, torch.float32)]
    own = {a.untyped_storage().data_ptr() for a in arguments}
    held = saved_storages(pair.fast, *arguments)
    extra = sum(size for storage, size in held.items() if storage not in own)
    per_row = 2 * 64 * 4  # the layer norms keep the mean and the deviation of each row
    if pair.name == "momentum_norm":  # g + (β/γ)v is kept, and g is let go
        g = arguments[3].untyped_storage()
        assert g.data_ptr() not in held
        extra -= g.nbytes()
    assert extra <= (per_row if pair.name in ("layer_norm", "momentum_norm") else 0)
    with ops.reference_forms():  # the measure can fail: the plain forms keep intermediates
        plain = saved_storages(pair.fast, *arguments)
    if pair.name not in ("axpy", "axpy_through", "axpby", "ema"):
        assert sum(plain.values()) > sum(held.values())


@pytest.mark.parametrize("op", ["newton_schulz", "inverse_sqrt_apply"])
def test_saved_memory_does_not_grow_with_the_steps(op: str) -> None:
    pair = next(p for p in PAIRS if p.name == op)
    arguments = [a.requires_grad_() for a in pair.make_inputs(16, 4, 8, torch.float32)]
    function = getattr(ops, op)
    few, many = (
        sum(saved_storages(lambda *a, k=k: function(*a, steps=k), *arguments).values())
        for k in (2, 10)
    )
    assert few == many


@pytest.mark.parametrize("op", ["newton_schulz", "inverse_sqrt_apply"])
def test_a_double_backward_keeps_no_intermediates_of_the_recursion_either(op: str) -> None:
    pair = next(p for p in PAIRS if p.name == op)
    arguments = [a.requires_grad_() for a in pair.make_inputs(16, 4, 8, torch.float64)]

    def gradients(*leaves: Tensor) -> Tensor:
        found = torch.autograd.grad((pair.fast(*leaves) ** 2).sum(), leaves, create_graph=True)
        return torch.cat([g.flatten() for g in found])

    held = sum(saved_storages(gradients, *arguments).values())
    assert held <= 6 * sum(a.untyped_storage().nbytes() for a in arguments)
