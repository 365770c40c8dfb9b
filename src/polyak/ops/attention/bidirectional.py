"""Linear and momentum attention in which queries read later keys too."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from polyak.errors import ConfigError, unknown
from polyak.ops.attention.causal import attend, finish, with_ones
from polyak.ops.attention.feature_maps import feature_map_named
from polyak.ops.attention.options import Settings, check_shapes, check_tokens, compute_dtype
from polyak.ops.attention.weights import Clock, Weights, momentum_weights, powers
from polyak.ops.autograd import full_precision

Bidirectional = Literal["two_sided", "read_after_write", "lra"]


def bidirectional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mu: Tensor,
    gamma: Tensor,
    form: Bidirectional,
    options: Settings,
) -> Tensor:
    r"""Momentum attention over all keys; μ = 0, γ = 1 is linear attention.

    - `two_sided`, for encoders: key j weighs :math:`\gamma w(|i-j|+1)` for query i, momentum away
      from the query on both sides; the normalizer counts every real key.
    - `read_after_write`, for cross-attention: every query reads the state after the last real key,
      where key j weighs :math:`\gamma w(L-j+1)`, L the number of real keys.  Query and key may
      differ in length.
    - `lra`, as released for the Long Range Arena: no normalizer, φ(query) and φ(key) each divided
      by :math:`T^{1/4}`, key j weighs :math:`\gamma w(T-j+1)`, T the number of keys with padding.

    In the first two, masked keys are as if they were not there.  mu and gamma are float64, () or
    (Hₖ,).

    Raises:
        ConfigError: options that cannot work together.
        UnknownNameError: a form that does not exist.
    """
    if form not in get_args(Bidirectional):
        raise unknown("bidirectional", form, get_args(Bidirectional))
    check_shapes(query, key, value, same_length=form == "two_sided")
    if options.document_starts is not None:
        raise ConfigError(
            "document_starts needs causal attention: bidirectional forms read every key of a row"
        )
    if form == "lra" and (options.weighted_normalizer or options.scale != "none"):
        raise ConfigError(
            "bidirectional='lra' has its own scale and no normalizer: leave scale and "
            "weighted_normalizer out, or use 'two_sided' or 'read_after_write'"
        )
    mask = check_tokens("key_mask", options.key_mask, key)
    real = torch.ones_like(key[..., 0, 0], dtype=torch.bool) if mask is None else mask
    dtype, exact = value.dtype, compute_dtype(query, key, value)
    with full_precision(query.device):
        phi = feature_map_named(options.feature_map).apply
        q = phi(query.to(exact)).reshape(*query.shape[:2], key.shape[2], -1, key.shape[3])
        k, v = phi(key.to(exact)) * real[..., None, None], value.to(exact)
        if form == "lra":
            count = torch.full_like(real, True).cumsum(1)
            out = _read_all(q, k, v * real[..., None, None], _weights(mu, gamma, count, exact))
            return (out.flatten(2, 3) / math.sqrt(max(1, key.shape[1]))).to(dtype)
        factor: float | Tensor
        if options.scale == "sqrt_length":
            factor = real.sum(1).clamp_min(1).to(exact).rsqrt()[:, None, None, None, None]
        else:
            factor = options.factor(key.shape[3])
        v = with_ones(v) if options.weighted_normalizer else v
        if form == "two_sided":
            out = _two_sided(q, k, v, mu, gamma, real, options)
        else:
            out = _read_all(q, k, v, _weights(mu, gamma, real.cumsum(1), exact))
        if options.normalize and not options.weighted_normalizer:
            out = out / (_read(q, k.sum(1)[..., None]) + options.eps / factor)
        return finish(out, options, factor).flatten(2, 3).to(dtype)


def _weights(mu: Tensor, gamma: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """γ w(c_T − c_j + 1), (B, T, H or 1)."""
    _, total = powers(mu.reshape(-1), count.shape[1] + 1)
    step = (gamma.reshape(-1, 1) * total).to(dtype)
    return step[:, count[:, -1:] - count + 1].permute(1, 2, 0)


def _read_all(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """qᵀS with S = Σ weight_j k_j v_jᵀ, for every query."""
    return _read(q, (k * weights[..., None]).permute(0, 2, 3, 1) @ v.transpose(1, 2))


def _read(q: Tensor, s: Tensor) -> Tensor:
    """(B, T, Hₖ, H/Hₖ, D) queries of (B, Hₖ, D, M) states."""
    rows = q.transpose(1, 2).flatten(2, 3) @ s
    return rows.reshape(*rows.shape[:2], q.shape[1], q.shape[3], s.shape[3]).transpose(1, 2)


def _two_sided(
    q: Tensor, k: Tensor, v: Tensor, mu: Tensor, gamma: Tensor, real: Tensor, options: Settings
) -> Tensor:
    """Forward and backward momentum attention, less what both count: γ (q_i·k_i) v_i.

    Masked keys are 0 here.  Only those between real ones have to stop the clock; padding before or
    after may go on counting, and is then read (by padding alone) at its distance in positions.
    """
    outside = (real.cumsum(1) == 0) | (real.flip(1).cumsum(1).flip(1) == 0)
    ticking = real | outside

    def weights(at: Clock | None, chunk: int, like: Tensor) -> Weights:
        return momentum_weights(mu, gamma, at, chunk, like)

    def one_way(backward: bool) -> Tensor:
        inputs = (q.flatten(2, 3), k, v, ticking)
        query, key, value, mask = (t.flip(1) for t in inputs) if backward else inputs
        plain = Settings(
            feature_map="identity",
            normalize=False,
            chunk_size=options.chunk_size,
            recompute=options.recompute,
            key_mask=None if options.key_mask is None else mask,
        )
        out, _ = attend(query, key, value, None, plain, weights, momentum=True)
        return out.flip(1) if backward else out

    both = (one_way(False) + one_way(True)).reshape(*q.shape[:4], v.shape[3])
    own: Tensor = (q * k[:, :, :, None]).sum(-1, keepdim=True) * v[:, :, :, None]
    return both - gamma.to(v.dtype).reshape(-1, 1, 1) * own
