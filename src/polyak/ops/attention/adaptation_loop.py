"""The loop over a chunk's tokens that gives adaptive momentum its coefficients, and its gradient.

Its arrays are small (rows of the batch and heads × tokens of the chunk), and it is all overhead,
which is why this one file of `ops/` imports NumPy: the loop below took half to seven tenths of the
time of the same calls of torch with `out=` (0.52 for 4 rows and 64 tokens, 0.54 for 32, 0.70 for
96; 0.57 to 0.73 of a form with fewer calls; shortest of 15 interleaved, float32, one thread, torch
2.13).  Compiled by torch the loop would need a C++ compiler on the machine and a compilation for
every shape; without one it would be torch's calls again.  It runs on the memory of CPU tensors, in
the tensors' own precision.
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
    if without_data(change):
        return _trace(change)
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
    found, rows = _trace(change), len(change)
    mus, xs, ys, sizes = (_array(t) for t in found)
    own_y = _array(_own(found.y))
    tiny = np.full((1, 1), torch.finfo(change.dtype).tiny, dtype=xs.dtype)
    one, most = np.ones((1, 1), dtype=xs.dtype), np.full((1, 1), MOST, dtype=xs.dtype)
    own = _by_time(gram.diagonal(dim1=-2, dim2=-1))
    marks = None if held is None else [_by_time(t) for t in held]
    products = _array(gram * 2).swapaxes(0, 1)
    ys[0] = _array(along) * -2
    np.maximum(_array(size)[:, None], tiny, out=sizes[0])
    t = np.empty((rows, 1), dtype=xs.dtype)
    views = (mus, xs, _by_time(change), sizes, sizes[1:], ys, ys[1:], own_y, own, products)
    for i, (mu, x, changed, a, a_after, y, after, y_i, square, product) in enumerate(zip(*views)):  # noqa: B905
        np.sqrt(a, out=t)
        np.sqrt(t, out=t)
        np.divide(changed, t, out=x)
        np.subtract(x, one, out=x)
        np.multiply(x, x, out=mu)
        np.minimum(mu, most, out=mu)
        if guarded:
            mu *= a > tiny
        if marks is not None:
            mu *= marks[0][i]
            mu += marks[1][i]
        np.multiply(mu, a, out=t)
        np.add(t, y_i, out=t)
        np.multiply(t, mu, out=t)
        np.add(t, square, out=t)
        np.maximum(t, tiny, out=a_after)
        np.multiply(mu, y, out=after)
        np.add(after, product, out=after)
    return found


def without_data(tensor: Tensor) -> bool:
    """Whether a tensor has only a shape: where products are counted, or memory is estimated."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def _trace(change: Tensor) -> Trace:
    """Room for what the loop leaves."""
    rows, tokens = change.shape
    return Trace(
        mu=change.new_empty(tokens, rows, 1),
        x=change.new_empty(tokens, rows, 1),
        y=change.new_empty(tokens + 1, rows, tokens),
        a=change.new_empty(tokens + 1, rows, 1),
    )


def loop_back(
    trace: Trace, by_mu: Tensor, free: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `loop` with respect to change, gram, along and size, from those of μ (R, C)."""
    mus, x, y, a = trace
    tokens, rows, _ = mus.shape
    if without_data(mus):
        by_gram = y.new_empty(rows, tokens, tokens)
        return torch.empty_like(by_mu), by_gram, torch.empty_like(by_mu), a[0, :, 0]
    own = _own(y)
    tiny = torch.finfo(a.dtype).tiny
    slope = torch.where((x * x < MOST) & (a[:-1] > tiny), 2 * x, 0)  # ∂μ/∂x
    if free is not None:
        slope = slope * free.mT[..., None]
    root = a[:-1].pow(-0.25)
    # where |P| is 0, 1/a may overflow, and the slope is 0
    to_size = torch.where(slope == 0, 0, slope * (x + 1) / (-4 * a[:-1]))
    by_mus, by_ys, by_sizes = torch.empty_like(mus), torch.empty_like(y), torch.empty_like(a)
    by_ys[-1], by_sizes[-1] = 0, 0
    # three factors of the gradient of |P|² after a token: ∂a'/∂μ, ∂a'/∂y_i and ∂a'/∂a
    factors = torch.cat((2 * mus * a[:-1] + own, mus, mus * mus), dim=-1)
    spread = a.new_empty(rows, 3).numpy()
    to_mu, to_y, to_a = spread[:, :1], spread[:, 1:2], spread[:, 2:]
    work, t = np.empty((rows, tokens), dtype=spread.dtype), np.empty_like(spread[:, :1])
    slopes, sizes = _array(by_ys), _array(by_sizes)
    against_time: list[Any] = [
        _array(x)[::-1] for x in (by_mus, mus, y[:-1], factors, to_size, _own(by_ys))
    ]
    views = (*against_time, _by_time(by_mu)[::-1], slopes[:0:-1], slopes[-2::-1])
    sums = _array(by_mus[..., 0])[::-1]
    for out, mu, inner, factor, by_size, own_y, given, after, before, later, earlier, total in zip(  # noqa: B905
        *views, sizes[:0:-1], sizes[-2::-1], sums
    ):
        np.multiply(later, factor, out=spread)
        np.multiply(after, inner, out=work)
        np.add.reduce(work, axis=1, out=total)
        np.add(out, given, out=out)
        np.add(out, to_mu, out=out)
        np.multiply(mu, after, out=before)
        np.add(own_y, to_y, out=own_y)
        np.multiply(out, by_size, out=t)
        np.add(to_a, t, out=earlier)
    by_change = (by_mus * slope * root)[..., 0].mT
    by_gram = 2 * by_ys[1:].transpose(0, 1)
    by_gram.diagonal(dim1=-2, dim2=-1).add_(by_sizes[1:, :, 0].mT)
    return by_change, by_gram, -2 * by_ys[0], by_sizes[0, :, 0]


def _own(y: Tensor) -> Tensor:
    """y_i before token i, (C, R, 1)."""
    return y[:-1].diagonal(dim1=0, dim2=2).mT[..., None]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def _by_time(tensor: Tensor) -> Any:
    """(R, C) as an array (C, R, 1) of its own."""
    return _array(tensor.mT.contiguous()[..., None])
