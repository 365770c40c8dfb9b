"""The loop over a chunk's tokens that gives adaptive momentum its coefficients, and its gradient.

Its arrays are small (rows of the batch and heads × tokens of the chunk), and it is all overhead:
NumPy's is a fifth of torch's.  It runs on the memory of CPU tensors, in the tensors' own precision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST = 0.9999
"""The largest μ (the release's)."""


class Trace(NamedTuple):
    """What the loop leaves for its gradient, by time: μ and x − 1 (C, R, 1), y (C + 1, R, C), a."""

    mu: Tensor
    x: Tensor
    y: Tensor
    a: Tensor


def loop(
    change: Tensor, gram: Tensor, along: Tensor, size: Tensor, held: tuple[Tensor, Tensor] | None
) -> Trace:
    """μ of a chunk's tokens, row by row; 0 where P is 0.

    With y_t = −2⟨P, g_t U_t⟩ for every token t of the chunk and a = |P|², token i is

        x = change_i/a^¼,  μ = min((1 − x)², 0.9999),  a ← μ(μa + y_i) + |g_i U_i|²,
        y_t ← μ y_t + 2⟨g_i U_i, g_t U_t⟩.

    Args:
        change: (R, C).
        gram: ⟨g_i U_i, g_t U_t⟩, (R, C, C).
        along: ⟨P, g_t U_t⟩ before the chunk, (R, C).
        size: |P|² before the chunk, (R,).
        held: (free, fixed), (R, C): μ is μ·free + fixed.
    """
    tiny = torch.finfo(change.dtype).tiny
    if bool((size > tiny).all()):
        found = _loop(change, gram, along, size, held, guarded=False)
        if bool((found.a > tiny).all()):
            return found
    return _loop(change, gram, along, size, held, guarded=True)


def _loop(
    change: Tensor,
    gram: Tensor,
    along: Tensor,
    size: Tensor,
    held: tuple[Tensor, Tensor] | None,
    guarded: bool,
) -> Trace:
    """`loop`; guarded: P may be 0, where |P|² is stored as the smallest number."""
    rows, tokens = change.shape
    found = Trace(
        mu=change.new_empty(tokens, rows, 1),
        x=change.new_empty(tokens, rows, 1),
        y=change.new_empty(tokens + 1, rows, tokens),
        a=change.new_empty(tokens + 1, rows, 1),
    )
    mus, xs, ys, sizes = (_array(t) for t in found)
    tiny = np.full((1, 1), torch.finfo(change.dtype).tiny, dtype=xs.dtype)
    one, most = np.ones((1, 1), dtype=xs.dtype), np.full((1, 1), MOST, dtype=xs.dtype)
    changes, own = _by_time(change), _by_time(gram.diagonal(dim1=-2, dim2=-1))
    marks = None if held is None else [_by_time(t) for t in held]
    products = _array(gram) * 2
    ys[0] = _array(along) * -2
    np.maximum(_array(size)[:, None], tiny, out=sizes[0])
    t = np.empty((rows, 1), dtype=xs.dtype)
    for i in range(tokens):
        mu, x, a, y, after = mus[i], xs[i], sizes[i], ys[i], ys[i + 1]
        np.sqrt(a, out=t)
        np.sqrt(t, out=t)
        np.divide(changes[i], t, out=x)
        np.subtract(x, one, out=x)
        np.multiply(x, x, out=mu)
        np.minimum(mu, most, out=mu)
        if guarded:
            mu *= a > tiny
        if marks is not None:
            mu *= marks[0][i]
            mu += marks[1][i]
        np.multiply(mu, a, out=t)
        np.add(t, y[:, i : i + 1], out=t)
        np.multiply(t, mu, out=t)
        np.add(t, own[i], out=t)
        np.maximum(t, tiny, out=sizes[i + 1])
        np.multiply(mu, y, out=after)
        np.add(after, products[:, i], out=after)
    return found


def loop_back(
    trace: Trace, by_mu: Tensor, free: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `loop` with respect to change, gram, along and size, from those of μ (R, C)."""
    mus, x, y, a = trace
    tokens, rows, _ = mus.shape
    own = y[:-1].diagonal(dim1=0, dim2=2).mT[..., None]
    tiny = torch.finfo(a.dtype).tiny
    slope = torch.where((x * x < MOST) & (a[:-1] > tiny), 2 * x, 0)  # ∂μ/∂x
    if free is not None:
        slope = slope * free.mT[..., None]
    root = a[:-1].pow(-0.25)
    # where |P| is 0, 1/a may overflow, and the slope is 0
    to_size = torch.where(slope == 0, 0, slope * (x + 1) / (-4 * a[:-1]))
    by_mus, by_ys, by_sizes = torch.empty_like(mus), torch.empty_like(y), torch.empty_like(a)
    by_ys[-1], by_sizes[-1] = 0, 0
    outs, slopes, sizes = _array(by_mus), _array(by_ys), _array(by_sizes)
    mu, squares, inner = _array(mus), _array(mus * mus), _array(y)
    given, to_a = _by_time(by_mu), _array(to_size)
    along = _array(2 * mus * a[:-1] + own)  # ∂a'/∂μ
    t = np.empty((rows, 1), dtype=outs.dtype)
    for i in range(tokens - 1, -1, -1):
        out, after, later, before = outs[i], slopes[i + 1], sizes[i + 1], slopes[i]
        np.einsum("rc,rc->r", after, inner[i], out=out[:, 0])
        np.add(out, given[i], out=out)
        np.multiply(later, along[i], out=t)
        np.add(out, t, out=out)
        np.multiply(mu[i], after, out=before)
        np.multiply(mu[i], later, out=t)
        before[:, i : i + 1] += t
        np.multiply(squares[i], later, out=sizes[i])
        np.multiply(out, to_a[i], out=t)
        np.add(sizes[i], t, out=sizes[i])
    by_change = (by_mus * slope * root)[..., 0].mT
    by_gram = 2 * by_ys[1:].transpose(0, 1)
    by_gram.diagonal(dim1=-2, dim2=-1).add_(by_sizes[1:, :, 0].mT)
    return by_change, by_gram, -2 * by_ys[0], by_sizes[0, :, 0]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def _by_time(tensor: Tensor) -> Any:
    """(R, C) as an array (C, R, 1) of its own."""
    return _array(tensor.mT.contiguous()[..., None])
