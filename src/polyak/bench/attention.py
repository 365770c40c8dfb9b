"""Timing attention with a matrix state beside softmax: forward + backward at several lengths.

At its own best chunk each: every kind is timed at every chunk size given.  Adaptive momentum is
also timed token by token, where that is asked for (it takes minutes at long lengths).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak import ops
from polyak.bench.timing import Measurement, interleave, peak_bytes
from polyak.statistics.intervals import spread

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SOFTMAX = "softmax"


def attentions(
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    rounds: int,
    chunk_sizes: tuple[int, ...] = (32, 64, 128),
    token_loop: bool = False,
) -> list[Measurement]:
    """Forward + backward of every kind, causal, float32, interleaved.

    Args:
        batch: B.
        tokens: T.
        heads: H.
        width: D, of keys and of values.
        rounds: timed rounds.
        chunk_sizes: what the kinds that have chunks are timed at.
        token_loop: time the token recurrence of adaptive momentum too.

    Returns:
        One row per kind and chunk size (None where there are no chunks): seconds, how many times
        faster than softmax in the same round (median, lowest, highest), and the peak of what torch
        allocates, gradients included, with its ratio to softmax's.
    """
    torch.manual_seed(0)
    q, k, v, cotangent = (torch.randn(batch, tokens, heads, width) for _ in range(4))
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    candidates: dict[tuple[str, int | None], Attention] = {(SOFTMAX, None): _softmax}
    for chunk_size in chunk_sizes:
        for name, op in _kinds().items():
            candidates[name, chunk_size] = partial(op, chunk_size=chunk_size)
    if token_loop:
        candidates["adaptive_momentum[tokens]", None] = _token_loop

    def step(attention: Attention) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*inputs), inputs, cotangent)

    steps: dict[str, Callable[[], Any]] = {
        f"{name} {size}": partial(step, op) for (name, size), op in candidates.items()
    }
    peaks = [peak_bytes(one) for one in steps.values()]
    seconds = list(interleave(steps, rounds).values())
    rows: list[Measurement] = []
    for (name, size), found, peak in zip(candidates, seconds, peaks, strict=True):
        ratios = [s / mine for s, mine in zip(seconds[0], found, strict=True)]
        rows.append(
            {
                "name": name,
                "chunk_size": size,
                "seconds": spread(found),
                "speed_up": spread(ratios),
                "peak_bytes": peak,
                "relative_peak": peak / peaks[0],
            }
        )
    return rows


def _kinds() -> dict[str, Callable[..., Tensor]]:
    momentum: Any = partial(ops.momentum_attention, mu=0.6, gamma=1.0)
    return {
        "linear": ops.linear_attention,
        "momentum": momentum,
        "momentum[recompute]": partial(momentum, recompute=True),
        "adaptive_momentum": partial(ops.adaptive_momentum_attention, gamma=0.6),
    }


def _softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _token_loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.adaptive_momentum_attention_recurrent(query, key, value, gamma=0.6)[0]
