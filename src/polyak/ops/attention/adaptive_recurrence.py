"""Adaptive momentum attention one token at a time: how a model decodes, and the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyak.ops.attention.adaptation_loop import MOST
from polyak.ops.attention.causal import finish, memory
from polyak.ops.attention.feature_maps import feature_map_named
from polyak.ops.attention.options import (
    AttentionState,
    FirstStep,
    Settings,
    check_shapes,
    check_state,
    check_tokens,
)
from polyak.ops.autograd import full_precision


def fresh_state(key: Tensor, value: Tensor, state: AttentionState | None) -> AttentionState:
    """The state given, in float32 or better, or that before any token."""
    batch, _, heads, width = key.shape
    if state is not None:
        shapes = {"key": (batch, heads, width), "value": (batch, heads, value.shape[3])}
        check_state(state, {**shapes, "seen": (batch,)})
    s, p, z = memory(state, key, value, momentum=True)
    if state is None or state.key is None or state.value is None or state.seen is None:
        seen = torch.zeros(batch, dtype=torch.int64, device=key.device)
        return AttentionState(s, p, z, torch.zeros_like(z), torch.zeros_like(s[:, :, 0]), seen)
    return AttentionState(s, p, z, state.key.to(s.dtype), state.value.to(s.dtype), state.seen)


def adaptive_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    first_step: FirstStep,
    state: AttentionState | None,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """One token: query (B, H, D), key (B, Hₖ, D), value (B, Hₖ, M); gamma float64, () or (Hₖ,).

    Plain torch code, differentiable to every order.  The state that is passed in stays as it is.
    """
    query, key, value = query[:, None], key[:, None], value[:, None]
    check_shapes(query, key, value)
    real, start = (
        None if mark is None else check_tokens(name, mark[:, None], key)
        for name, mark in (
            ("key_mask", options.key_mask),
            ("document_starts", options.document_starts),
        )
    )
    before = fresh_state(key, value, state)
    if start is not None:
        kept = (t if t is None else torch.where(_per(start, t), 0, t) for t in before)
        before = AttentionState(*kept)  # type: ignore[arg-type]
    s, p, z, last_key, last_value, seen = before
    assert p is not None
    assert last_key is not None
    assert last_value is not None
    assert seen is not None
    with full_precision(query.device):
        phi = feature_map_named(options.feature_map).apply
        q, k, v = phi(query[:, 0].to(s.dtype)), phi(key[:, 0].to(s.dtype)), value[:, 0].to(s.dtype)
        u = k[..., None] * v[..., None, :]
        gamma = gamma.to(s.dtype).reshape(-1, 1, 1)
        change = (u - last_key[..., None] * last_value[..., None, :]).square().sum((-1, -2))
        size = p.square().sum((-1, -2))
        first = (seen == 0)[:, None]
        mu = _mu(change, size, gamma[..., 0, 0], first)
        step = torch.where(first, torch.ones_like(mu), gamma[..., 0, 0].expand_as(mu))
        if first_step == "gamma":
            step = gamma[..., 0, 0].expand_as(mu)
        p_next = mu[..., None, None] * p - step[..., None, None] * u
        after = AttentionState(s - p_next, p_next, z + k, k, v, seen + 1)
        if real is not None:
            chosen = (
                torch.where(_per(real, new), new, old)
                for new, old in zip(after, before, strict=True)
                if new is not None and old is not None
            )
            after = AttentionState(*chosen)
        out = q.reshape(*k.shape[:2], -1, q.shape[-1]) @ after.S
        factor = options.factor(key.shape[3])
        if options.normalize:
            queries = q.reshape(*k.shape[:2], -1, q.shape[-1])
            out = out / (queries @ after.Z[..., None] + options.eps / factor)
        out = finish(out, options, factor).flatten(1, 2)
    return out.to(value.dtype), after


def _mu(change: Tensor, size: Tensor, gamma: Tensor, first: Tensor) -> Tensor:
    """μ from |U − U before|² and |P|², (B, Hₖ): its gradient is 0 where either is 0."""
    moving = (change > 0) & (size > 0)
    ratio = torch.where(moving, change, 1) / torch.where(moving, size, 1)
    root = torch.where(moving, gamma.sqrt() * ratio.pow(0.25), 0)
    mu = (1 - root).square().clamp(max=MOST)
    return torch.where((size > 0) & ~first, mu, 0)


def recur_adaptive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    first_step: FirstStep,
    state: AttentionState | None,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """`adaptive_step` for every token of (B, T, H, D) inputs."""
    check_shapes(query, key, value)
    outputs, after = [], fresh_state(key, value, state)
    for t in range(query.shape[1]):
        mask, starts = (
            None if mark is None else mark[:, t]
            for mark in (options.key_mask, options.document_starts)
        )
        now = replace(options, key_mask=mask, document_starts=starts)
        token = query[:, t], key[:, t], value[:, t]
        out, after = adaptive_step(*token, gamma, first_step, after, now)
        outputs.append(out)
    empty = value.new_empty(*query.shape[:3], value.shape[3])
    return (torch.stack(outputs, dim=1) if outputs else empty), after


def _per(mark: Tensor, like: Tensor) -> Tensor:
    """A (B, 1) mark for every entry of a state."""
    return mark.reshape(-1, *(1 for _ in like.shape[1:]))
