"""The ten-iteration inverse square root that shampoo and soap apply to each token.

The iterates X are polynomials in R' = R + 1e-6 I and commute with it, so W = X²R'/n obeys
W ← ¼W(3I − W)² and M·X obeys M ← ½M(3I − W): with Z = ½(3I − W), two D×D products and one H×D
product an iteration, and X itself is never formed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyak.ops.autograd import (
    add_to_diagonal,
    apply,
    apply_uncompiled,
    batch_first,
    by_tokens,
    forward_mode,
    full_precision,
    in_legacy_vmap,
    pushforward,
    symmetric,
    trace,
    vjp,
    with_batch,
    zero_if_none,
)
from polyak.ops.reference import (
    INVERSE_SQRT_DAMPING,
    inverse_sqrt_apply_reference,
    using_reference_forms,
)

# Bytes, per thread, of one chunk of D×D matrices: the three or four in use then stay in the
# second-level cache, which multiplies the speed of 64×64 products.  Other devices only need
# bounded memory.
_CHUNK_BYTES_CPU = 1 << 18
_CHUNK_BYTES_OTHER = 1 << 26

# Differentiating the gradient holds about this many times more memory than computing it.
_SECOND_ORDER_SHARE = 16


def inverse_sqrt_apply(m: Tensor, r: Tensor, steps: int = 10) -> Tensor:
    r"""Return M·(R + 1e-6 I)^{-1/2} by `steps` iterations of a polynomial.

    With R' = R + 1e-6 I and n = ‖R'‖_F: X ← I, `steps` times :math:`X \leftarrow
    \tfrac12 X(3I - X(R'/n)X)`, result :math:`M X/\sqrt n`.  For ill-conditioned R the iteration
    is not converged after ten steps; the polynomial, not the inverse root, is what is returned.

    Shapes: m (..., H, D), r (..., D, D) to (..., H, D).  R must be symmetric positive
    semi-definite; the gradient with respect to R is its symmetric part, that is, the gradient of
    this function of (R + Rᵀ)/2.  Only m and r are saved for the backward pass, whatever `steps`
    is.  16-bit inputs are computed in float32.
    Source: arXiv 2605.24425 (ShampooFormer, SOAPFormer).
    """
    assert steps >= 1, "the inverse square root needs at least one iteration"
    if using_reference_forms():
        return inverse_sqrt_apply_reference(m, r, steps)
    m, r = with_batch(m, r), with_batch(r, m)
    dtype = torch.promote_types(m.dtype, r.dtype)
    working = torch.promote_types(dtype, torch.float32)
    with full_precision(m.device):
        flat_m = m.to(working).reshape(-1, *m.shape[-2:])
        flat_r = r.to(working).reshape(-1, *r.shape[-2:])
        result: Tensor = apply_uncompiled(_InverseSqrt, flat_m, flat_r, steps)
    return result.reshape(m.shape).to(dtype)


def inverse_sqrt_apply_flops(heads: int, head_dim: int, steps: int = 10) -> tuple[int, int]:
    """Matrix-product FLOPs per token of the fast form: (forward, backward).

    Counts 2 per multiply-add, as torch's FlopCounterMode does.
    """
    thin, full = heads * head_dim**2, head_dim**3
    forward = steps * thin + (2 * steps - 2) * full
    backward = forward + 2 * steps * thin + (2 * steps - 2) * full
    return 2 * forward, 2 * backward


class _InverseSqrt(torch.autograd.Function):
    """M·f(R) for m (N, H, D) and r (N, D, D)."""

    @staticmethod
    def forward(m: Tensor, r: Tensor, steps: int) -> Tensor:
        return _value(m, r, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        m, r, ctx.steps = inputs
        ctx.save_for_backward(m, r)
        ctx.save_for_forward(m, r)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        m, r = ctx.saved_tensors
        return *apply(_InverseSqrtVjp, m, r, grad, ctx.steps), None

    @staticmethod
    def jvp(ctx: Any, m_tangent: Tensor | None, r_tangent: Tensor | None, _: None) -> Tensor:
        with forward_mode(*ctx.saved_tensors) as (m, r):
            dm, dr = zero_if_none(m_tangent, m), zero_if_none(r_tangent, r)
            return _plain_jvp(m, dm, r, symmetric(dr), ctx.steps)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], m: Tensor, r: Tensor, steps: int
    ) -> tuple[Tensor, int]:
        m, r = batch_first(info.batch_size, in_dims, m, r)
        flat = apply(_InverseSqrt, m.flatten(0, 1), r.flatten(0, 1), steps)
        return flat.unflatten(0, m.shape[:2]), 0


class _InverseSqrtVjp(torch.autograd.Function):
    """The gradient of `_InverseSqrt` as a Function of its own.

    The first derivative takes the fast route; second derivatives differentiate the plain formula
    of the gradient, a slice of tokens at a time, and hold nothing but these inputs meanwhile.
    """

    @staticmethod
    def forward(m: Tensor, r: Tensor, grad: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        if in_legacy_vmap(m, r, grad):
            return _plain_vjp(m, r, grad, steps)
        return _vjp(m, r, grad, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        m, r, grad, ctx.steps = inputs
        ctx.save_for_backward(m, r, grad)
        ctx.save_for_forward(m, r, grad)

    @staticmethod
    def backward(ctx: Any, m_bar: Tensor, r_bar: Tensor) -> tuple[Tensor | None, ...]:
        def pull(*operands: Tensor) -> tuple[Tensor, ...]:
            *primals, m_bar, r_bar = operands
            _, back = vjp(partial(_plain_vjp, steps=ctx.steps), *primals)
            gradients: tuple[Tensor, ...] = back((m_bar, r_bar))
            return gradients

        m, r, grad = ctx.saved_tensors
        tokens = max(1, _chunk_tokens(r) // _SECOND_ORDER_SHARE)
        return *by_tokens(pull, tokens, m, r, grad, m_bar, r_bar), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        with forward_mode(*ctx.saved_tensors) as primals:
            filled = tuple(zero_if_none(t, p) for t, p in zip(tangents, primals, strict=False))
            result: tuple[Tensor, ...] = pushforward(
                partial(_plain_vjp, steps=ctx.steps), primals, filled
            )
            return result

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], m: Tensor, r: Tensor, grad: Tensor, steps: int
    ) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        m, r, grad = batch_first(info.batch_size, in_dims, m, r, grad)
        flat = apply(_InverseSqrtVjp, m.flatten(0, 1), r.flatten(0, 1), grad.flatten(0, 1), steps)
        return tuple(t.unflatten(0, m.shape[:2]) for t in flat), (0, 0)


def _chunk_tokens(r: Tensor) -> int:
    cpu = r.device.type == "cpu"
    limit = _CHUNK_BYTES_CPU * torch.get_num_threads() if cpu else _CHUNK_BYTES_OTHER
    return max(1, limit // (r.shape[-1] ** 2 * r.element_size()))


def _frobenius(r: Tensor) -> Tensor:
    """‖R + δI‖_F without forming R + δI: ‖R‖² + 2δ tr R + Dδ²."""
    delta = INVERSE_SQRT_DAMPING
    squared = (r * r).sum(dim=(-2, -1), keepdim=True)
    return (squared + 2 * delta * trace(r) + r.shape[-1] * delta**2).sqrt()


def _scaled(r: Tensor, norm: Tensor, out: Tensor) -> Tensor:
    """W₀ = (R + δI)/n, written into `out`."""
    torch.div(r, norm, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(INVERSE_SQRT_DAMPING / norm[..., 0])
    return out


def _recursion(
    m: Tensor, r: Tensor, steps: int, z: list[Tensor], w: Tensor, half: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Run the recursion on one chunk; returns M₀ … M_K and n.

    All `steps` iterations, whatever the values: to stop once a chunk has converged would let a
    token's last bits depend on its neighbours, later ones among them.  Z_k is written into
    z[k mod len(z)]; `w` and `half` are work space.
    """
    norm = _frobenius(r)
    _scaled(r, norm, out=w)
    iterates = [m]
    for step in range(steps):
        factor = z[step % len(z)]
        torch.mul(w, -0.5, out=factor)
        factor.diagonal(dim1=-2, dim2=-1).add_(1.5)
        iterates.append(torch.bmm(iterates[-1], factor))
        if step < steps - 1:  # the last iteration needs no new W
            torch.bmm(w, factor, out=half)
            torch.bmm(half, factor, out=w)
    return iterates, norm


def _value(m: Tensor, r: Tensor, steps: int) -> Tensor:
    result = torch.empty_like(m)
    tokens = _chunk_tokens(r)
    z, w, half = (torch.empty_like(r[:tokens]) for _ in range(3))
    for i in range(0, m.shape[0], tokens):
        part = slice(i, i + tokens)
        n = r[part].shape[0]
        iterates, norm = _recursion(m[part], r[part], steps, [z[:n]], w[:n], half[:n])
        torch.div(iterates[-1], norm.sqrt(), out=result[part])
    return result


def _vjp(m: Tensor, r: Tensor, grad: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gradients of ⟨grad, M·f(R)⟩ with respect to M and the symmetric R.

    A reverse sweep on every chunk.  With W' = WZ² and Z = ½(3I − W), all symmetric and commuting,
    the adjoint of one iteration is W̄ ← ZW̄Z − ½(W̄WZ + ZWW̄), which is the symmetric part of
    Z(P + 2Pᵀ) − 3P with P = W̄Z: two products.
    """
    m_grad, r_grad = torch.empty_like(m), torch.empty_like(r)
    tokens = _chunk_tokens(r)
    work = [torch.empty_like(r[:tokens]) for _ in range(steps + 3)]
    for i in range(0, m.shape[0], tokens):
        part = slice(i, i + tokens)
        n = r[part].shape[0]
        w, p, mixed, *z = (buffer[:n] for buffer in work)
        iterates, norm = _recursion(m[part], r[part], steps, z, w, p)
        m_bar = grad[part] / norm.sqrt()
        # ½⟨grad, result⟩ comes from the factor 1/√n of the result.
        along_norm = -0.5 * (m_bar * iterates[-1]).sum(dim=(-2, -1), keepdim=True)
        for k in reversed(range(len(iterates) - 1)):
            outer = iterates[k].transpose(-2, -1)
            if k == len(iterates) - 2:
                torch.bmm(outer, m_bar, out=p).mul_(-0.25)
            else:
                torch.bmm(w, z[k], out=p)
                torch.add(p, p.transpose(-2, -1), alpha=2, out=mixed)
                torch.baddbmm(p, z[k], mixed, beta=-1.5, alpha=0.5, out=p)
                torch.baddbmm(p, outer, m_bar, alpha=-0.25, out=p)
            torch.add(p, p.transpose(-2, -1), out=w)
            m_bar = torch.bmm(m_bar, z[k])
        m_grad[part] = m_bar
        # R̄ = W̄₀/n + n̄R'/n with n̄ = −⟨W̄₀, W₀⟩/n − ½⟨grad, result⟩/n.
        start = _scaled(r[part], norm, out=p)
        torch.mul(w, start, out=mixed)
        along_norm = (along_norm - mixed.sum(dim=(-2, -1), keepdim=True)) / norm
        torch.div(w, norm, out=r_grad[part]).addcmul_(start, along_norm)
    return m_grad, r_grad


def _polynomial(m: Tensor, dm: Tensor, w: Tensor, dw: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """M·p(W) and its derivative in the direction (dM, dW), in plain differentiable torch."""
    for step in range(steps):
        z, dz = add_to_diagonal(-0.5 * w, 1.5), -0.5 * dw
        m, dm = m @ z, dm @ z + m @ dz
        if step < steps - 1:
            half, dhalf = w @ z, dw @ z + w @ dz
            w, dw = half @ z, dhalf @ z + half @ dz
    return m, dm


def _plain_jvp(m: Tensor, dm: Tensor, r: Tensor, dr: Tensor, steps: int) -> Tensor:
    """Derivative of M·p(R'/n)/√n in the direction (dM, dR), dR symmetric."""
    norm = _frobenius(r)
    w = add_to_diagonal(r / norm, INVERSE_SQRT_DAMPING / norm[..., 0])
    dlog = (w * dr).sum(dim=(-2, -1), keepdim=True) / norm
    m, dm = _polynomial(m, dm, w, dr / norm - w * dlog, steps)
    return (dm - 0.5 * dlog * m) * norm.rsqrt()


def _plain_vjp(m: Tensor, r: Tensor, grad: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`_vjp` in differentiable torch, in which the derivative of p at W is its own adjoint."""
    norm = _frobenius(r)
    w = add_to_diagonal(r / norm, INVERSE_SQRT_DAMPING / norm[..., 0])
    grad = grad * norm.rsqrt()
    direction = symmetric(m.transpose(-2, -1) @ grad)
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device).expand_as(r)
    p, w_bar = _polynomial(identity, torch.zeros_like(w), w, direction, steps)
    n_bar = (w_bar * w + 0.5 * direction * p).sum(dim=(-2, -1), keepdim=True)
    return grad @ p, (w_bar - n_bar * w) / norm
