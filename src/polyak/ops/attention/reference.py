"""Linear and momentum attention by their weights: one T × T matrix beside Q Kᵀ."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.ops.attention.causal import finish, memory, with_ones
from polyak.ops.attention.feature_maps import feature_map_named
from polyak.ops.attention.options import AttentionState, Settings, check_shapes, check_tokens
from polyak.ops.autograd import full_precision


def momentum_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mu: Tensor,
    gamma: Tensor,
    state: AttentionState | None,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """o_i = [Σ_{j≤i} γ w(c_i − c_j + 1)(q_i·k_j) v_j]/[Σ_{j≤i} q_i·k_j + eps], w(n) = Σ_{m<n} μᵐ.

    c counts real tokens; j runs over real tokens of i's document.  Of an earlier state, i reads
    S − μw(c_i)P and Z while its document is that state's.  mu and gamma are float64, () or (H,).
    """
    number = key.shape[1] + 1
    exponents = torch.arange(number, device=key.device, dtype=torch.float64)
    mu, gamma = mu.reshape(-1, 1), gamma.reshape(-1, 1)
    power = mu**exponents  # (H, T+1)
    w = torch.stack([power[:, :n].sum(-1) for n in range(number)], dim=-1)
    tables = gamma * w, -gamma * power, -mu * w, power
    return _quadratic(query, key, value, tables, state, options)


def linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """o_i = [q_iᵀS + Σ_{j≤i} (q_i·k_j) v_j]/[q_i·Z + Σ_{j≤i} q_i·k_j + eps], j as above."""
    one = torch.ones(1, key.shape[1] + 1, dtype=torch.float64, device=key.device)
    return _quadratic(query, key, value, (one,), state, options)


def _quadratic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, ...],
    state: AttentionState | None,
    options: Settings,
) -> tuple[Tensor, AttentionState]:
    """Attention whose weights are `tables` (H, T+1) of the number of real tokens between.

    tables: of U_j in S and in P, both by c_i − c_j + 1 (in P by one less), and of an earlier P in
    S and in P, by c_i; linear attention has only the first.
    """
    check_shapes(query, key, value)
    mask = check_tokens("key_mask", options.key_mask, key)
    starts = check_tokens("document_starts", options.document_starts, key)
    factor, dtype, heads = options.factor(key.shape[3]), value.dtype, key.shape[2]
    if options.weighted_normalizer:
        value = with_ones(value)
    s, p, z = memory(state, key, value, len(tables) > 1)
    tables = tuple(t.to(s.dtype) for t in tables)
    none = torch.zeros(key.shape[:2], dtype=torch.bool, device=key.device)
    real = ~none if mask is None else mask
    document = (none if starts is None else starts).cumsum(1)
    count = real.cumsum(1)  # c
    with full_precision(query.device):
        phi = feature_map_named(options.feature_map).apply
        q = torch.unflatten(phi(query.to(s.dtype)), 2, (heads, -1))
        k, v = phi(key.to(s.dtype)), value.to(s.dtype)
        same = document[:, :, None] == document[:, None]
        seen = torch.ones_like(same).tril() & same & real[:, None]
        gap = (count[:, :, None] - count[:, None]) * seen
        pairs = torch.einsum("bihgd,bjhd->bhgij", q, k) * seen[:, None, None]
        here = (document == 0).to(s.dtype)[:, :, None, None, None]
        weight = tables[0][:, gap + 1].transpose(0, 1)[:, :, None]  # B, H, 1, T, T
        out = torch.einsum("bhgij,bjhm->bihgm", pairs * weight, v)
        out = out + here * torch.einsum("bihgd,bhdm->bihgm", q, s)
        if p is not None:
            reads = tables[2][:, count].permute(1, 2, 0)[..., None, None]  # B, T, H, 1, 1
            out = out + here * reads * torch.einsum("bihgd,bhdm->bihgm", q, p)
        if options.normalize and not options.weighted_normalizer:
            below = pairs.sum(-1).permute(0, 3, 1, 2)[..., None]
            below = below + here * torch.einsum("bihgd,bhd->bihg", q, z)[..., None]
            out = out / (below + options.eps / factor)
        out = finish(out, options, factor).flatten(2, 3).to(dtype)
        if key.shape[1] == 0:
            return out, AttentionState(s, p, z)
        # the state: what the last token sees
        last, end = seen[:, -1].to(s.dtype)[..., None], here[:, -1]
        writes = tables[0][:, gap[:, -1] + 1].permute(1, 2, 0) * last  # B, T, H
        s_next = end * s + torch.einsum("bjh,bjhd,bjhm->bhdm", writes, k, v)
        z = end[..., 0] * z + torch.einsum("bj,bjhd->bhd", last[..., 0], k)
        if p is not None:
            s_next = s_next + end * tables[2][:, count[:, -1]].T[..., None, None] * p
            pushes = tables[1][:, gap[:, -1]].permute(1, 2, 0) * last
            p = end * tables[3][:, count[:, -1]].T[..., None, None] * p
            p = p + torch.einsum("bjh,bjhd,bjhm->bhdm", pushes, k, v)
    return out, AttentionState(s_next, p, z)
