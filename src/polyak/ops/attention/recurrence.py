"""Linear and momentum attention one token at a time: how a model decodes, and a slow reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyak.ops.attention.causal import finish, memory, with_ones
from polyak.ops.attention.feature_maps import feature_map_named
from polyak.ops.attention.options import AttentionState, Settings, check_shapes, check_tokens
from polyak.ops.autograd import full_precision


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mu: Tensor | None,
    gamma: Tensor | None,
    state: AttentionState | None,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """P = μP − γU, S = S − P, Z = Z + k, o = qᵀS/(q·Z + eps); without mu: S = S + U.

    Shapes: query (B, H, D), key (B, Hₖ, D), value (B, Hₖ, M); mu and gamma float64, () or (Hₖ,).
    The state that is passed in stays as it is.
    """
    query, key, value = query[:, None], key[:, None], value[:, None]
    check_shapes(query, key, value)
    marks = {
        name: None if mark is None else check_tokens(name, mark[:, None], key)
        for name, mark in (
            ("key_mask", options.key_mask),
            ("document_starts", options.document_starts),
        )
    }
    real, start = marks["key_mask"], marks["document_starts"]
    factor, dtype = options.factor(key.shape[3]), value.dtype
    if options.weighted_normalizer:
        value = with_ones(value)
    s, p, z = memory(state, key, value, mu is not None)
    if start is not None:
        s, z = (t.masked_fill(_per(start, t), 0) for t in (s, z))
        p = None if p is None else p.masked_fill(_per(start, p), 0)
    with full_precision(query.device):
        phi = feature_map_named(options.feature_map).apply
        q, k, v = phi(query[:, 0].to(s.dtype)), phi(key[:, 0].to(s.dtype)), value[:, 0].to(s.dtype)
        u = k[..., None] * v[..., None, :]
        after: tuple[Tensor, Tensor | None, Tensor]
        if p is None:
            after = s + u, None, z + k
        else:
            assert mu is not None
            assert gamma is not None
            mu, gamma = (c.to(s.dtype).reshape(-1, 1, 1) for c in (mu, gamma))
            p_next = mu * p - gamma * u
            after = s - p_next, p_next, z + k
        if real is not None:
            s, z = (
                torch.where(_per(real, new), new, old)
                for new, old in ((after[0], s), (after[2], z))
            )
            if p is not None and after[1] is not None:
                p = torch.where(_per(real, p), after[1], p)
        else:
            s, p, z = after
        queries = q.reshape(*k.shape[:2], -1, q.shape[-1])  # B, Hₖ, H/Hₖ, D
        out = queries @ s
        if options.normalize and not options.weighted_normalizer:
            out = out / (queries @ z[..., None] + options.eps / factor)
        out = finish(out, options, factor).flatten(1, 2)
    return out.to(dtype), AttentionState(s, p, z)


def recur(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mu: Tensor | None,
    gamma: Tensor | None,
    state: AttentionState | None,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """`step` for every token of (B, T, H, D) inputs."""
    check_shapes(query, key, value)
    outputs = []
    if state is None:
        sums = with_ones(value) if options.weighted_normalizer else value
        state = AttentionState(*memory(None, key, sums, mu is not None))
    for t in range(query.shape[1]):
        mask, starts = (
            None if mark is None else mark[:, t]
            for mark in (options.key_mask, options.document_starts)
        )
        now = replace(options, key_mask=mask, document_starts=starts)
        out, state = step(query[:, t], key[:, t], value[:, t], mu, gamma, state, now)
        outputs.append(out)
    return torch.stack(outputs, dim=1) if outputs else _nothing(query, value), state


def _nothing(query: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(*query.shape[:3], value.shape[3])


def _per(mark: Tensor, like: Tensor) -> Tensor:
    """A (B, 1) mark for every entry of a state."""
    return mark.reshape(-1, *(1 for _ in like.shape[1:]))
