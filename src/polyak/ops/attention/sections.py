"""How a sequence is cut: into chunks, and into sections of chunks that are computed together.

Here too is the walk over the chunks as its plain equations (`plain_walk`), which the fast walk is
compared with, and which serves wherever a gradient is itself differentiated or transformed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.ops.attention.feature_maps import FEATURE_MAPS
from polyak.ops.attention.weights import Weights

# Entries of one section's Q Kᵀ: one MiB in float32, a quarter with `recompute`.  The dozen tensors
# of about this size then stay in the cache, and are little beside the inputs and their gradients.
_SECTION = 1 << 18


class Form(NamedTuple):
    """What a walk computes besides its tensors; the options of `AttentionOptions`."""

    feature_map: str
    normalize: bool
    eps: float
    chunk: int
    recompute: bool = False


class Section(NamedTuple):
    """`number` chunks of `size` tokens with their weights: the tokens from start to stop."""

    start: int
    stop: int
    number: int
    size: int
    weights: Weights


class Memory(NamedTuple):
    """S, P and Z, (B, H, …) or at several chunks (N, B, H, …); P is None for linear attention."""

    s: Tensor
    p: Tensor | None
    z: Tensor

    def at(self, index: int | slice) -> Memory:
        """A part along the first dimension."""
        return Memory(self.s[index], None if self.p is None else self.p[index], self.z[index])

    def clone(self) -> Memory:
        """The same in memory of its own."""
        return Memory(self.s.clone(), None if self.p is None else self.p.clone(), self.z.clone())

    def set(self, index: slice, values: Memory) -> None:
        """Overwrite a part."""
        for mine, new in zip(self, values, strict=True):
            if mine is not None and new is not None:
                mine[index] = new


def sections(
    query: Tensor, form: Form, whole: Weights, rest: Weights | None, together: int | None = None
) -> Iterator[Section]:
    """The sections of queries (B, T, H, D), in order of time.

    `rest` has the weights of a last, shorter chunk; without it the last chunk is filled up with
    tokens of weight 0.  `together` chunks make a section; None: as many as fit the cache.
    """
    (rows, tokens, heads), size = query.shape[:3], form.chunk
    chunks = tokens // size if rest is not None else -(-tokens // size)
    if together is None:
        budget = _SECTION // 4 if form.recompute else _SECTION
        together = max(1, budget // max(1, rows * heads * size * size))
    for first in range(0, chunks, together):
        last = min(first + together, chunks)
        stop = min(last * size, tokens)
        yield Section(first * size, stop, last - first, size, whole.chunks(first, last))
    if rest is not None and tokens > chunks * size:
        yield Section(chunks * size, tokens, 1, tokens - chunks * size, rest)


def take(x: Tensor, part: Section, heads: int, dtype: torch.dtype, filling: float = 0.0) -> Tensor:
    """A section of (B, T, H, D) as (N, B, heads, H/heads · C, D), in memory of its own."""
    x = x[:, part.start : part.stop]
    fill = part.number * part.size - x.shape[1]
    if fill:
        x = F.pad(x, (0, 0, 0, 0, 0, fill), value=filling)
    batch, _, rows, width = x.shape
    x = x.reshape(batch, part.number, part.size, heads, rows // heads, width)
    x = x.permute(1, 0, 3, 4, 2, 5)
    # always a copy, which callers may overwrite
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(3, 4)


def by_time(x: Tensor, part: Section) -> Tensor:
    """The inverse of `take`, with heads (B, T, heads, H/heads, D)."""
    x = torch.unflatten(x, 3, (-1, part.size)).permute(1, 0, 4, 2, 3, 5).flatten(1, 2)
    return x[:, : part.stop - part.start]


def put(x: Tensor, part: Section, into: Tensor) -> None:
    """Write a section to its place in (B, T, H, D)."""
    x = by_time(x, part)
    into[:, part.start : part.stop].copy_(x.flatten(2, 3))


def per_row(weight: Tensor, rows: int) -> Tensor:
    """A weight (…, C) of tokens as a factor (…, rows, 1) of rows: the tokens for each query."""
    group = rows // weight.shape[-1]
    return (weight.repeat(1, 1, 1, group) if group > 1 else weight)[..., None]


def scaled(x: Tensor, weight: Tensor | None) -> Tensor:
    """x (…, rows, D) times its tokens' weights; None is 1."""
    return x if weight is None else x * per_row(weight, x.shape[-2])


def grouped(a: Tensor, size: int) -> Tensor:
    """(…, H/heads · C, n) as (…, H/heads, C, n)."""
    return torch.unflatten(a, 3, (-1, size))


class Turn(NamedTuple):
    """keep, read and decay over a whole chunk, each a factor of (B, H, D, M)."""

    keep: Tensor | None
    read: Tensor | None
    decay: Tensor | None


def turn(w: Weights, n: int) -> Turn:
    """What chunk n of a section does to the state before it."""

    def of(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight[n if weight.shape[0] > 1 else 0]

    keep, read, decay = of(w.keep), of(w.read), of(w.decay)
    return Turn(
        None if keep is None else keep[..., -1:, None],
        None if read is None else read[..., -1:, None],
        None if decay is None else decay[..., None, None],
    )


def plain_walk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Memory,
    form: Form,
    whole: Weights,
    rest: Weights | None,
) -> tuple[Tensor, Memory]:
    """Outputs (B, T, H, M) and the state after the last token, by the equations of `weights`."""
    s, p, z = state
    phi, heads, outputs = FEATURE_MAPS[form.feature_map].apply, key.shape[2], []
    for part in sections(query, form, whole, rest, together=1):
        w, dtype = part.weights, s.dtype
        q, k = phi(take(query, part, heads, dtype)), phi(take(key, part, heads, dtype))
        v = take(value, part, heads, dtype)
        a, kept, now = grouped(q @ k.mT, part.size), scaled(q, w.keep), turn(w, 0)
        out = (a * w.mix[:, :, :, None]).flatten(3, 4) @ v + kept @ s
        if form.normalize:
            norm = w.mix if w.norm is None else w.norm
            below = (a * norm[:, :, :, None]).flatten(3, 4).sum(-1, keepdim=True)
        after = (s if now.keep is None else now.keep * s) + (scaled(k, w.write).mT @ v)[0]
        if p is not None:
            assert now.read is not None
            assert now.decay is not None
            out = out + scaled(q, w.read) @ p
            after = after + now.read * p
            p = now.decay * p + (scaled(k, w.push).mT @ v)[0]
        if form.normalize:
            out = out / (below + kept @ z[..., None] + form.eps)
        z = (z if now.keep is None else now.keep[..., 0] * z) + scaled(k, w.tally).sum(-2)[0]
        s = after
        outputs.append(by_time(out, part).flatten(2, 3))
    empty = value.new_zeros(*query.shape[:3], value.shape[3], dtype=s.dtype)
    return (torch.cat(outputs, dim=1) if outputs else empty), Memory(s, p, z)
