"""Timing attention with a matrix state beside softmax: forward + backward at several lengths.

Every kind at its own best chunk size, which is chosen by measuring.  At one length also what
`recompute` costs, and adaptive momentum token by token.
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
VARIANTS_AT = 1024
"""The variants in brackets are timed at the longest length up to this one."""
CHOSEN_UP_TO = 4096
"""Chunk sizes are chosen at lengths up to this one; longer ones take those of the one before."""
ONCE = 10.0
"""Seconds from which on a step is timed once."""
DEFAULT = 64
"""The chunk size that kinds have by themselves: kept unless another is 5 % faster."""
_TRIES = 2  # timed rounds in which chunk sizes are compared


def attentions(
    batch: int,
    lengths: tuple[int, ...],
    heads: int,
    width: int,
    rounds: int,
    chunk_sizes: tuple[int, ...] = (32, 64, 128),
) -> list[Measurement]:
    """Forward + backward of every kind, causal, float32, all lengths and kinds interleaved.

    Args:
        batch: B.
        lengths: every T, ascending.
        heads: H.
        width: D, of keys and of values.
        rounds: timed rounds.
        chunk_sizes: what the kinds that have chunks choose from.

    Returns:
        One row per length and kind, `KIND[recompute]` and `adaptive_momentum[tokens]` at one
        length only: the chunk size (None where there is none); seconds; and, round by round
        (median, lowest, highest), how many times faster than softmax at that length (`speed_up`),
        the time over linear's, or of a variant over its kind's (`relative_time`), and the time
        over that of the same at the length before (`growth`, None at the first); the peak of what
        torch allocates, gradients included, with its ratio to softmax's.
    """
    torch.manual_seed(0)
    varied = max((n for n in lengths if n <= VARIANTS_AT), default=None)
    chunks: dict[str, int] = {}
    chosen: dict[tuple[int, str], int | None] = {}
    steps: dict[tuple[int, str], Callable[[], Any]] = {}
    for tokens in lengths:
        step = partial(_step, *_inputs(batch, tokens, heads, width))
        if tokens <= CHOSEN_UP_TO or not chunks:
            sizes = tuple(size for size in chunk_sizes if size <= tokens) or chunk_sizes[:1]
            chunks = {name: _best(op, step, sizes) for name, op in _kinds().items()}
        for name, op in _candidates(chunks, tokens == varied).items():
            chosen[tokens, name] = chunks.get(_kind(name)) if op is not _token_loop else None
            steps[tokens, name] = partial(step, op)
    peaks = {key: peak_bytes(step) for key, step in steps.items()}
    seconds = interleave(steps, rounds, once=ONCE)
    rows: list[Measurement] = []
    for (tokens, name), found in seconds.items():
        shorter = [n for n in lengths if n < tokens and (n, name) in seconds]
        base = _kind(name) if "[" in name else "linear"

        def over(other: list[float], mine: list[float] = found) -> dict[str, float]:
            return spread([m / o for m, o in zip(mine, other, strict=True)])

        softmax = seconds[tokens, SOFTMAX]
        rows.append(
            {
                "tokens": tokens,
                "name": name,
                "chunk_size": chosen[tokens, name],
                "seconds": spread(found),
                "speed_up": spread([s / m for s, m in zip(softmax, found, strict=True)]),
                "relative_time": over(seconds[tokens, base]),
                "growth": over(seconds[shorter[-1], name]) if shorter else None,
                "peak_bytes": peaks[tokens, name],
                "relative_peak": peaks[tokens, name] / peaks[tokens, SOFTMAX],
            }
        )
    return rows


def _inputs(batch: int, tokens: int, heads: int, width: int) -> tuple[tuple[Tensor, ...], Tensor]:
    q, k, v, cotangent = (torch.randn(batch, tokens, heads, width) for _ in range(4))
    return tuple(t.requires_grad_() for t in (q, k, v)), cotangent


def _step(inputs: tuple[Tensor, ...], cotangent: Tensor, op: Attention) -> tuple[Tensor, ...]:
    return torch.autograd.grad(op(*inputs), inputs, cotangent)


def _best(
    op: Callable[..., Tensor], step: Callable[[Attention], Any], sizes: tuple[int, ...]
) -> int:
    """The chunk size with the shortest time; the default where it is as good."""
    steps = {size: partial(step, partial(op, chunk_size=size)) for size in sizes}
    seconds = interleave(steps, _TRIES)
    return min(sizes, key=lambda size: min(seconds[size]) * (0.95 if size == DEFAULT else 1))


def _candidates(chunks: dict[str, int], variants: bool) -> dict[str, Attention]:
    """What is timed at one length, by name."""
    found: dict[str, Attention] = {SOFTMAX: _softmax}
    for name, op in _kinds().items():
        found[name] = partial(op, chunk_size=chunks[name])
        if variants:
            found[f"{name}[recompute]"] = partial(op, chunk_size=chunks[name], recompute=True)
    return {**found, "adaptive_momentum[tokens]": _token_loop} if variants else found


def _kind(name: str) -> str:
    return name.partition("[")[0]


def _kinds() -> dict[str, Callable[..., Tensor]]:
    return {
        "linear": ops.linear_attention,
        "momentum": partial(ops.momentum_attention, mu=0.6, gamma=1.0),
        "adaptive_momentum": partial(ops.adaptive_momentum_attention, gamma=0.6),
    }


def _softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _token_loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ops.adaptive_momentum_attention_recurrent(query, key, value, gamma=0.6)[0]
