"""Adaptive momentum attention (Nguyen et al. 2022, arXiv:2208.00579): momentum set by the data."""

from __future__ import annotations

from typing import Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.errors import ConfigError, unknown
from polyak.ops.attention.adaptation import Shares, Tokens, shares
from polyak.ops.attention.adaptive_recurrence import adaptive_step, fresh_state, recur_adaptive
from polyak.ops.attention.causal import finish
from polyak.ops.attention.feature_maps import mapped
from polyak.ops.attention.options import (
    AttentionOptions,
    AttentionState,
    FirstStep,
    Settings,
    check_shapes,
    check_tokens,
    coefficient,
    settings_of,
)
from polyak.ops.attention.sections import Form, Memory
from polyak.ops.attention.trail import change, trail
from polyak.ops.attention.walk import ordinary, walk
from polyak.ops.attention.weights import Clock, Weights, clock, linear_weights
from polyak.ops.autograd import full_precision
from polyak.ops.reference import using_reference_forms


def adaptive_momentum_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: Tensor | float,
    first_step: FirstStep = "unit",
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Momentum attention whose coefficient follows from how much the last token changed.

    With :math:`q = \varphi(query)`, :math:`k = \varphi(key)`, every :math:`U_j = k_j v_j^T` and
    Frobenius norms, one coefficient per row and head,

    .. math:: \mu_i = \min\left(\left(1 - \sqrt{\gamma |U_i - U_{i-1}| / |P_{i-1}|}\right)^2,
        0.9999\right), \quad P_i = \mu_i P_{i-1} - \gamma U_i, \quad S_i = S_{i-1} - P_i, \quad
        Z_i = Z_{i-1} + k_i, \quad o_i = \frac{q_i^T S_i}{q_i \cdot Z_i + eps}.

    The first step of a document is :math:`P_1 = -U_1`, as released (`unit`), or :math:`-\gamma U_1`
    (`gamma`, with which γ only scales the numerator).  Where P is 0, μ is 0; where U did not
    change, μ is 0.9999; both without a gradient.  Gradients flow through μ otherwise.

    Chunks need a loop over tokens, but only of scalars and vectors of a chunk's length: matrices
    are computed as in `momentum_attention`.

    Args:
        query: (B, T, H, D).
        key: (B, T, Hₖ, D); H is a multiple of Hₖ, and each state serves H/Hₖ query heads.
        value: (B, T, Hₖ, M).
        gamma: positive, a number or one for each key/value head, (Hₖ,); may be learned.
        first_step: `unit` or `gamma`.
        options: see `AttentionOptions`; there is no weighted_normalizer.

    Returns:
        (B, T, H, M) in value's dtype.

    Raises:
        ConfigError: gamma out of range, shapes that do not fit together, or options that cannot
            work.
        UnknownNameError: an option, or a name, that does not exist.
    """
    return adaptive_momentum_attention_with_state(
        query, key, value, gamma=gamma, first_step=first_step, **options
    )[0]


def adaptive_momentum_attention_with_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    *,
    gamma: Tensor | float,
    first_step: FirstStep = "unit",
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """`adaptive_momentum_attention` that goes on from a state; the one after the last token too.

    In forward mode and in torch.func transforms, token by token; so is the gradient of its
    gradient.

    Raises:
        ConfigError: as there, or a state of other shapes.
    """
    settings = _settings(first_step, options)
    check_shapes(query, key, value)
    step = coefficient("gamma", gamma, key)
    before = fresh_state(key, value, state)
    tensors = [t for t in (query, key, value, step, *before) if t is not None]
    if using_reference_forms() or not (torch.compiler.is_compiling() or ordinary(tensors)):
        return recur_adaptive(query, key, value, step, first_step, state, settings)
    return _in_chunks(query, key, value, before, step, first_step, settings)


def adaptive_momentum_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    *,
    gamma: Tensor | float,
    first_step: FirstStep = "unit",
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """One token of the same, (B, H, D), (B, Hₖ, D), (B, Hₖ, M) → (B, H, M), and the state after it.

    key_mask and document_starts are (B,) here.
    """
    settings = _settings(first_step, options)
    step = coefficient("gamma", gamma, key[:, None])
    return adaptive_step(query, key, value, step, first_step, state, settings)


def adaptive_momentum_attention_recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    *,
    gamma: Tensor | float,
    first_step: FirstStep = "unit",
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """The same token by token: `adaptive_momentum_attention_step` T times."""
    settings = _settings(first_step, options)
    check_shapes(query, key, value)
    step = coefficient("gamma", gamma, key)
    return recur_adaptive(query, key, value, step, first_step, state, settings)


def _settings(first_step: FirstStep, options: AttentionOptions) -> Settings:
    if first_step not in get_args(FirstStep):
        raise unknown("first_step", first_step, get_args(FirstStep))
    settings = settings_of(options)
    if settings.weighted_normalizer:
        raise ConfigError(
            "weighted_normalizer=True is not defined for adaptive momentum: leave it out"
        )
    return settings


def _in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: AttentionState,
    gamma: Tensor,
    first_step: FirstStep,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """The coefficients of every token, then the walk with their weights."""
    mask = check_tokens("key_mask", options.key_mask, key)
    starts = check_tokens("document_starts", options.document_starts, key)
    tokens, dtype, factor = key.shape[1], before.S.dtype, options.factor(key.shape[3])
    if tokens == 0:
        return value.new_empty(*query.shape[:3], value.shape[3]), before
    size = min(options.chunk_size, tokens)
    left = tokens % size
    at = clock(mask, starts, size, tokens)
    if left and at is None:  # whole chunks, then a shorter one
        state, outputs = before, []
        for part in (slice(-left), slice(-left, None)):
            q, k, v = (t[:, part] for t in (query, key, value))
            out, state = _in_chunks(q, k, v, state, gamma, first_step, options)
            outputs.append(out)
        return torch.cat(outputs, dim=1), state
    assert before.P is not None
    assert before.seen is not None
    with full_precision(query.device):
        name = options.feature_map
        q, k = mapped(query.to(dtype), name), mapped(key.to(dtype), name)
        v = value.to(dtype)
        behind = trail(k, v, before, mask, starts)
        gammas = gamma.to(dtype).expand(*k.shape[:3])
        step, first = gammas, behind.first
        if first is None:
            first = torch.zeros_like(k[..., 0, 0], dtype=torch.bool)
            first[:, 0] = before.seen == 0
        if first_step == "unit":
            step = torch.where(first[..., None], 1, step)
        free = fixed = None
        if at is not None:
            real = torch.ones_like(first) if mask is None else mask
            step = step * real[..., None]
            begins = torch.zeros_like(first) if starts is None else starts
            free, fixed = (real & ~first & ~begins).to(dtype), (~real & ~begins).to(dtype)
        moved = v * step[..., None]
        told = Tokens(
            _chunks(k, size),
            _chunks(moved, size),
            _chunks(change(k, v, behind) * gammas.sqrt(), size),
            None if free is None else _chunks(free[..., None].expand(*k.shape[:3]), size),
            None if fixed is None else _chunks(fixed[..., None].expand(*k.shape[:3]), size, 1.0),
        )
        numbers = None if at is None else at.real.to(dtype)
        weights = _weights(shares(told, before.P, numbers), at)
    form = Form("identity", options.normalize, options.eps / factor, size, options.recompute)
    out, after = walk(q, k, moved, Memory(before.S, before.P, before.Z), form, weights, None)
    out = finish(out, options, factor).to(value.dtype)
    return out, AttentionState(*after, behind.key, behind.value, behind.seen)


def _chunks(x: Tensor, size: int, filling: float = 0.0) -> Tensor:
    """(B, T, H, …) as (N, B, H, size, …), T filled up to whole chunks."""
    fill = -x.shape[1] % size
    if fill:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, fill), value=filling)
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return x.movedim(1, 0).movedim(2, 3).contiguous()


def _weights(share: Shares, at: Clock | None) -> Weights:
    """Weights of chunks whose values are times their steps."""
    mix, read, written = share.mix, -share.carried, share.written
    plain = linear_weights(at, mix.shape[-1], mix)
    if at is not None:
        mix, read = mix * at.sees(), read * (at.document == 0)
        written = mix[..., -1, :]
    push, decay = -share.last[..., 1:], share.last[..., 0]
    return Weights(mix, plain.mix, plain.keep, read, written, push, plain.tally, decay)
