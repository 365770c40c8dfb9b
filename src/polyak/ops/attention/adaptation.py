"""The coefficients of adaptive momentum attention, chunk by chunk, without its matrices.

Every μ depends on |P|, and so on every μ before it; but within a chunk P is a known combination of
its U = k vᵀ, so |P|² follows from inner products ⟨U_i, U_j⟩ = (k_i·k_j)(v_i·v_j).  What is left of
the recurrence is a loop over scalars and C-vectors (`adaptation_loop`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.ops.attention.adaptation_loop import MOST, Trace, loop, loop_back
from polyak.ops.autograd import (
    apply_uncompiled,
    full_precision,
    gradients_again,
    in_legacy_vmap,
    to_differentiate,
)


class Tokens(NamedTuple):
    """What the coefficients depend on, (N, B, H, C, …): keys, and values times their step g.

    change is √(γ|U − U before|).  Where free is 0, μ is `fixed`; None: all are free.
    """

    key: Tensor
    value: Tensor
    change: Tensor
    free: Tensor | None
    fixed: Tensor | None


class Shares(NamedTuple):
    """Of −P before the chunk (carried) and of each U_j, what is in S and in −P; (N, B, H, C, …).

    mix[i, j] and carried[i]: in S after token i; written[j] and last[1 + j], last[0]: in S and in
    −P after the chunk's last token.
    """

    mix: Tensor
    carried: Tensor
    written: Tensor
    last: Tensor


def shares(tokens: Tokens, p: Tensor, real: Tensor | None) -> Shares:
    """The shares that follow from μ = min((1 − √(γ|U − U before|/|P|))², 0.9999).

    −P after token i holds μ₁…μ_i of −P before the chunk and μ_{j+1}…μ_i of U_j, j ≤ i; S gains −P
    at every real token.

    Args:
        tokens: the chunks.
        p: P before the first, (B, H, D, M).
        real: which tokens are real, (N, B, 1, C) as numbers; None: all.
    """
    return Shares(*apply_uncompiled(_Shares, *tokens, p, real))


class _Shares(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        value: Tensor,
        change: Tensor,
        free: Tensor | None,
        fixed: Tensor | None,
        p: Tensor,
        real: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        inputs = key, value, change, free, fixed, p, real
        with full_precision(key.device):
            return _Shares._forward(ctx, *inputs)

    @staticmethod
    def _forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        key, value, change, free, fixed, p, real = inputs
        if not _fast(key):
            ctx.save_for_backward(*inputs)
            return _plain(*inputs)
        k, v, steps = key.flatten(1, 2), value.flatten(1, 2), change.flatten(1, 2)
        now = p.flatten(0, 1)
        gram = (k @ k.mT) * (v @ v.mT)
        saved: list[Tensor] = []
        befores = []
        for n in range(len(k)):
            befores.append(now)
            held = None
            if free is not None and fixed is not None:
                held = free[n].flatten(0, 1), fixed[n].flatten(0, 1)
            along = ((k[n] @ now) * v[n]).sum(-1)
            trace = loop(steps[n], gram[n], along, (now * now).sum((-1, -2)), held)
            saved += trace
            # the last decays: products of later μ
            left = trace.mu.flip(0).cumprod(0).flip(0)[..., 0].mT  # R, C
            kept = torch.cat((left[:, 1:], torch.ones_like(left[:, :1])), dim=1)
            now = torch.baddbmm(
                left[:, :1, None] * now, (k[n] * kept[..., None]).mT, v[n], alpha=-1
            )
        mu = torch.stack(saved[::4])[..., 0].mT.reshape(change.shape)
        left, mix, carried = _products(mu, real)
        ctx.save_for_backward(*inputs, left, torch.stack(befores), *saved)
        return mix, carried, mix[..., -1, :].clone(), left[..., -1, :].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: checkpoints hand them out once
        with full_precision(saved[0].device):
            return _Shares._backward(saved, ctx.needs_input_grad, *grads)

    @staticmethod
    def _backward(
        saved: tuple[Any, ...], needed: tuple[bool, ...], *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = saved[:7]
        given = [t for t in (*inputs, *grads) if t is not None]
        if to_differentiate(*given) or in_legacy_vmap(*given) or not _fast(inputs[0]):
            return tuple(gradients_again(_plain, inputs, needed, grads))
        key, value, change, free, _, p, real = inputs
        left, befores, traces = saved[7].flatten(1, 2), saved[8], saved[9:]
        k, v = key.flatten(1, 2), value.flatten(1, 2)
        by_change = torch.empty_like(change).flatten(1, 2)
        by_gram, by_along = k.new_empty(*k.shape[:-1], k.shape[-2]), torch.empty_like(by_change)
        mu = torch.stack(traces[::4])[..., 0].mT
        earlier = left[..., :-1, :]
        by_shares = (None if g is None else g.flatten(1, 2) for g in grads)
        by_mu = _by_products(mu, earlier, real, *by_shares)
        by_ps, pushed = torch.zeros_like(befores), torch.empty_like(v)
        by_p = torch.zeros_like(befores[0])
        kept = left[..., -1, 1:, None]
        for n in reversed(range(len(k))):
            before, by_ps[n] = befores[n], by_p
            torch.bmm(k[n], by_p, out=pushed[n])
            by_left = (by_p * before).sum((-1, -2))[:, None], -(pushed[n] * v[n]).sum(-1)
            inner = earlier[n] @ torch.cat(by_left, dim=-1)[..., None]
            to_mu = by_mu[n] + (inner * kept[n])[..., 0]
            held = None if free is None else free[n].flatten(0, 1)
            trace = Trace(*traces[4 * n : 4 * n + 4])
            by_change[n], by_gram[n], by_along[n], by_size = loop_back(trace, to_mu, held)
            by_p = left[n, :, -1, :1, None] * by_p + 2 * by_size[:, None, None] * before
            by_p = torch.baddbmm(by_p, (k[n] * by_along[n, ..., None]).mT, v[n])
        by_gram = by_gram + by_gram.mT
        by_k = (by_gram * (v @ v.mT)) @ k - (v @ by_ps.mT).mul_(kept)
        by_v = (by_gram * (k @ k.mT)) @ v - pushed.mul_(kept)
        by_k.addcmul_(v @ befores.mT, by_along[..., None])
        by_v.addcmul_(k @ befores, by_along[..., None])
        every = (by_k.view_as(key), by_v.view_as(value), by_change.view_as(change))
        return *every, None, None, by_p.view_as(p), None


def _fast(tensor: Tensor) -> bool:
    """Whether the loop can run on numbers: a tensor of the CPU, float32 or float64.

    Or on none: a tensor of the meta device, where only shapes count.
    """
    return (tensor.is_cpu or tensor.is_meta) and tensor.dtype in (torch.float32, torch.float64)


def _products(mu: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Shares in −P of μ (N, B, H, C), before each token and after the last; mix and carried."""
    size = mu.shape[-1]
    left = mu.new_zeros(*mu.shape[:-1], size + 1, size + 1)
    mix, carried = mu.new_zeros(*mu.shape, size), torch.empty_like(mu)
    left[..., 0, 0] = 1
    for i in range(size):
        now = left[..., i + 1, : i + 1]
        torch.mul(left[..., i, : i + 1], mu[..., i, None], out=now)
        left[..., i + 1, i + 1] = 1
        gained = left[..., i + 1, : i + 2]
        if real is not None:
            gained = gained * real[..., i, None]
        if i == 0:
            mix[..., 0, :1], carried[..., 0] = gained[..., 1:], gained[..., 0]
        else:
            torch.add(mix[..., i - 1, : i + 1], gained[..., 1:], out=mix[..., i, : i + 1])
            torch.add(carried[..., i - 1], gained[..., 0], out=carried[..., i])
    return left, mix, carried


def _by_products(
    mu: Tensor,
    earlier: Tensor,
    real: Tensor | None,
    by_mix: Tensor | None,
    by_carried: Tensor | None,
    by_written: Tensor | None,
    by_last: Tensor | None,
) -> Tensor:
    """The gradient of `_products` with rows (R) for (B, H), and the shares before each token."""
    size = mu.shape[-1]
    by = torch.zeros_like(earlier)  # of shares in −P
    if by_last is not None:
        by[..., -1, :] = by_last
    later = torch.zeros_like(by[..., -1, :])  # of shares in S, summed over later tokens
    if by_written is not None:
        later[..., 1:] = by_written
    if real is not None:
        rows = mu.shape[1] // real.shape[1]
        real = real.repeat(1, 1, rows, 1).flatten(1, 2)
    for i in reversed(range(size)):
        now = by[..., i, : i + 2]
        if by_mix is not None:
            later[..., 1:].add_(by_mix[..., i, :])
        if by_carried is not None:
            later[..., 0].add_(by_carried[..., i])
        gain = later[..., : i + 2]
        now.add_(gain if real is None else gain * real[..., i, None])
        if i + 1 < size:
            now.addcmul_(mu[..., i + 1, None], by[..., i + 1, : i + 2])
    found: Tensor = torch.linalg.vecdot(by, earlier)
    return found


def _plain(
    key: Tensor,
    value: Tensor,
    change: Tensor,
    free: Tensor | None,
    fixed: Tensor | None,
    p: Tensor,
    real: Tensor | None,
) -> tuple[Tensor, ...]:
    """`shares` in plain torch code."""
    found, tiny = [], torch.finfo(change.dtype).tiny
    for n in range(len(key)):
        k, v, mus = key[n], value[n], []
        gram = (k @ k.mT) * (v @ v.mT)
        y, a = -2 * ((k @ p) * v).sum(-1), (p * p).sum((-1, -2)).clamp_min(tiny)
        for i in range(change.shape[-1]):
            mu = (1 - change[n, ..., i] * a.pow(-0.25)).square().clamp(max=MOST)
            mu = torch.where(a > tiny, mu, 0)
            if free is not None and fixed is not None:
                mu = mu * free[n, ..., i] + fixed[n, ..., i]
            a = (mu * (mu * a + y[..., i]) + gram[..., i, i]).clamp_min(tiny)
            y = mu[..., None] * y + 2 * gram[..., i, :]
            mus.append(mu)
        ones = torch.eye(len(mus) + 1, dtype=p.dtype, device=p.device)
        rows = [ones[0].expand(*p.shape[:2], -1)]
        for i, mu in enumerate(mus):
            rows.append(mu[..., None] * rows[-1] + ones[i + 1])
        found.append(torch.stack(rows[1:], dim=-2))
        last = rows[-1]
        p = last[..., :1, None] * p - (k * last[..., 1:, None]).mT @ v
    left = torch.stack(found)
    total = left if real is None else left * real[..., None]
    total = total.cumsum(-2)
    return total[..., 1:], total[..., 0], total[..., -1, 1:], left[..., -1, :]
