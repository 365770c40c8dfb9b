"""What the causal kinds share around the walk: options, dtypes, masks, states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyak.ops.attention.options import (
    AttentionState,
    Settings,
    check_shapes,
    check_state,
    check_tokens,
    compute_dtype,
)
from polyak.ops.attention.sections import Form, Memory
from polyak.ops.attention.walk import walk
from polyak.ops.attention.weights import Clock, Weights, clock

MakeWeights = Callable[[Clock | None, int, Tensor], Weights]
"""The weights of chunks of that many tokens, in a tensor's dtype and device."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None,
    options: Settings,
    weights: MakeWeights,
    momentum: bool,
) -> tuple[Tensor, AttentionState]:
    """Outputs in value's dtype and the state after the last token, float32 or better.

    weights: of the kind; momentum: whether it has a P.
    """
    check_shapes(query, key, value)
    mask = check_tokens("key_mask", options.key_mask, key)
    starts = check_tokens("document_starts", options.document_starts, key)
    factor, tokens, dtype = options.factor(key.shape[3]), key.shape[1], value.dtype
    if options.weighted_normalizer:
        value = with_ones(value)
    before = memory(state, key, value, momentum)
    chunk = max(1, min(options.chunk_size, tokens))
    at = clock(mask, starts, chunk, tokens)
    left = tokens % chunk
    whole = weights(at, chunk, before.s)
    rest = weights(None, left, before.s) if left and at is None else None
    divide = options.normalize and not options.weighted_normalizer
    form = Form(options.feature_map, divide, options.eps / factor, chunk, options.recompute)
    out, after = walk(query, key, value, before, form, whole, rest)
    return finish(out, options, factor).to(dtype), AttentionState(*after)


def memory(state: AttentionState | None, key: Tensor, value: Tensor, momentum: bool) -> Memory:
    """S, P and Z to go on from: zeros without a state."""
    batch, _, heads, width = key.shape
    shape = (batch, heads, width, value.shape[3])
    shapes = {"S": shape, "Z": shape[:3]} | ({"P": shape} if momentum else {})
    check_state(state, shapes)
    dtype = compute_dtype(key, value)
    if state is None:
        zeros = torch.zeros(shape, dtype=dtype, device=key.device)
        return Memory(zeros, torch.zeros_like(zeros) if momentum else None, zeros[..., 0].clone())
    p = state.P.to(dtype) if momentum and state.P is not None else None
    return Memory(state.S.to(dtype), p, state.Z.to(dtype))


def with_ones(value: Tensor) -> Tensor:
    """Values with one more column of ones: it sums keys as the others sum values."""
    return torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)


def finish(out: Tensor, options: Settings, factor: float | Tensor) -> Tensor:
    """Divide by the weighted normalizer, or scale what nothing divides."""
    if options.weighted_normalizer:
        return out[..., :-1] / (out[..., -1:] + options.eps / factor)
    return out if options.normalize else out * factor
