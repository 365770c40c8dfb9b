"""Every op in its fast and its reference form, timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak import ops
from polyak.bench.timing import Measurement, interleave
from polyak.statistics.intervals import spread


def kernels(tokens: int, num_heads: int, head_dim: int, rounds: int) -> list[Measurement]:
    """Forward + backward of every op in its fast and its reference form, interleaved, float32.

    Args:
        tokens: N, how many tokens at once.
        num_heads: H.
        head_dim: D.
        rounds: timed rounds.
    """
    rows = []
    for pair in ops.PAIRS:
        torch.manual_seed(0)
        inputs = pair.make_inputs(tokens, num_heads, head_dim, torch.float32)
        forms = {"fast": pair.fast, "reference": pair.reference}
        seconds = interleave({k: _op_step(form, inputs) for k, form in forms.items()}, rounds)
        rows.append(
            {
                "name": pair.name,
                "fast_seconds": spread(seconds["fast"]),
                "reference_seconds": spread(seconds["reference"]),
                "speed_up": statistics.median(
                    r / f for r, f in zip(seconds["reference"], seconds["fast"], strict=True)
                ),
            }
        )
    return rows


def _op_step(form: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[[], None]:
    leaves = tuple(
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for value in inputs
    )

    def step() -> None:
        y = form(*leaves)
        if y.requires_grad:
            y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    leaf.grad = None

    return step
