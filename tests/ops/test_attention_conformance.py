"""The Momentum Transformer's attention, as released and by its equations: value and gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from polyak import ops

FOLDER = Path(__file__).parents[1] / "conformance" / "momentum_transformer"

Inputs = tuple[Tensor, Tensor, Tensor]


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["hyperparameters"])


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.abs().max())


def leaves(tensors: dict[str, Tensor], arrange: Callable[[Tensor], Tensor]) -> Inputs:
    q, k, v = (arrange(tensors[n]).clone().requires_grad_() for n in ("query", "key", "value"))
    return q, k, v


def conforms(
    tensors: dict[str, Tensor],
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
) -> None:
    inputs = leaves(tensors, arrange)
    out = function(*inputs)
    assert relative(out, arrange(tensors["out"])) < 1e-10
    found = torch.autograd.grad(out, inputs, arrange(tensors["cotangent"]))
    for name, gradient in zip(("query", "key", "value"), found, strict=True):
        assert relative(gradient, arrange(tensors[f"grad.{name}"])) < 1e-10


def state_conforms(tensors: dict[str, Tensor], state: ops.AttentionState) -> None:
    for name in ("S", "P", "Z"):
        expected = tensors.get(f"final.{name}")
        if expected is None and f"state.{name}" in tensors:
            expected = tensors[f"state.{name}"][:, -1]
        if expected is not None:
            assert relative(getattr(state, name), expected) < 1e-10


def key_mask(tensors: dict[str, Tensor]) -> Tensor:
    return torch.arange(tensors["key"].shape[1]) < tensors["lengths"][:, None]


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_linear_attention_is_the_released_recurrence(chunk_size: int) -> None:
    tensors, given = load("attention_linear_recurrent")
    options: Any = {"eps": given["eps"], "chunk_size": chunk_size}
    conforms(tensors, lambda *x: ops.linear_attention(*x, **options))
    conforms(tensors, lambda *x: ops.linear_attention_recurrent(*x, **options)[0])
    inputs = tensors["query"], tensors["key"], tensors["value"]
    state_conforms(tensors, ops.linear_attention_with_state(*inputs, **options)[1])


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_linear_attention_with_padding_is_the_released_parallel_form(name: str) -> None:
    tensors, given = load(f"attention_linear_{name}")
    options: Any = {"eps": given["eps"], "key_mask": key_mask(tensors)}
    if name == "bidirectional":
        options["bidirectional"] = "two_sided"
    conforms(tensors, lambda *x: ops.linear_attention(*x, **options))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_momentum_attention_is_the_released_recurrence(number: int, chunk_size: int) -> None:
    tensors, given = load(f"attention_momentum_recurrent_{number}")
    options: Any = {**given, "chunk_size": chunk_size}
    conforms(tensors, lambda *x: ops.momentum_attention(*x, **options))
    conforms(tensors, lambda *x: ops.momentum_attention_recurrent(*x, **options)[0])
    inputs = tensors["query"], tensors["key"], tensors["value"]
    state_conforms(tensors, ops.momentum_attention_with_state(*inputs, **options)[1])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_adaptive_attention_is_the_released_recurrence(number: int, chunk_size: int) -> None:
    tensors, given = load(f"attention_adaptive_recurrent_{number}")
    options: Any = {"gamma": given["gamma"], "eps": given["eps"], "chunk_size": chunk_size}
    assert given["delta"] == pytest.approx(1 - 0.9999)
    conforms(tensors, lambda *x: ops.adaptive_momentum_attention(*x, **options))
    conforms(tensors, lambda *x: ops.adaptive_momentum_attention_recurrent(*x, **options)[0])
    inputs = tensors["query"], tensors["key"], tensors["value"]
    state_conforms(tensors, ops.adaptive_momentum_attention_with_state(*inputs, **options)[1])


@pytest.mark.parametrize("form", ["two_sided", "read_after_write"])
def test_bidirectional_momentum_attention_conforms(form: str) -> None:
    tensors, given = load(f"attention_momentum_{form}")
    options: Any = {**given, "bidirectional": form, "key_mask": key_mask(tensors)}
    conforms(tensors, lambda *x: ops.momentum_attention(*x, chunk_size=4, **options))


def test_the_released_training_form_conforms() -> None:
    tensors, given = load("attention_momentum_training_form_released")
    options: Any = {**given, "form": "released", "key_mask": key_mask(tensors)}
    conforms(tensors, lambda *x: ops.momentum_attention(*x, chunk_size=4, **options))


@pytest.mark.parametrize("name", ["linear", "momentum"])
def test_the_long_range_arena_form_conforms(name: str) -> None:
    tensors, given = load(f"lra_attention_{name}")
    op: Any = getattr(ops, f"{name}_attention")
    options: Any = {**given, "bidirectional": "lra", "key_mask": tensors["mask"]}
    conforms(tensors, lambda *x: op(*x, **options), arrange=lambda t: t.transpose(1, 2))


@pytest.mark.parametrize("name", ["linear", "momentum"])
def test_the_translation_form_is_reading_after_writing(name: str) -> None:
    tensors, given = load(f"nmt_attention_{name}")
    op: Any = getattr(ops, f"{name}_attention")
    options: Any = {**given, "bidirectional": "read_after_write"}
    conforms(tensors, lambda *x: op(*x, **options), arrange=lambda t: t[:, :, None])
