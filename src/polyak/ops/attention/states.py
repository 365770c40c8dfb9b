"""The states of a section of chunks: what keys write to them, and how they go on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyak.ops.attention.feature_maps import FEATURE_MAPS
from polyak.ops.attention.sections import Form, Memory, Section, scaled, take, turn
from polyak.ops.attention.weights import Weights


class Operands(NamedTuple):
    """A section's queries and keys after the feature map, and its values; (N, B, H, rows, D)."""

    q: Tensor
    k: Tensor
    v: Tensor


def operands(
    query: Tensor, key: Tensor, value: Tensor, part: Section, form: Form, dtype: torch.dtype
) -> Operands:
    """A section's part of (B, T, H, D) inputs."""
    phi, heads = FEATURE_MAPS[form.feature_map].apply, key.shape[2]
    return Operands(
        phi(take(query, part, heads, dtype)),
        phi(take(key, part, heads, dtype)),
        take(value, part, heads, dtype),
    )


def add_product(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """into += a b, batched over all leading dimensions, in place."""
    into.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
    return into


def advance(at: Operands, before: Memory, w: Weights) -> Memory:
    """The states before each chunk of a section and after its last: N + 1 of them."""
    if w.tally is None:
        tallied = at.k.sum(-2)
    else:
        tallied = (at.k.mT @ w.tally.expand(*at.k.shape[:-1])[..., None])[..., 0]
    written = scaled(at.k, w.write).mT @ at.v
    number = written.shape[0]
    states = _room(before, number)
    s, p, z = states
    s[0], z[0] = before.s, before.z
    if p is not None:
        assert before.p is not None
        pushed, p[0] = scaled(at.k, w.push).mT @ at.v, before.p
    for n in range(number):
        now = turn(w, n)
        if now.keep is None:
            torch.add(s[n], written[n], out=s[n + 1])
            torch.add(z[n], tallied[n], out=z[n + 1])
        else:
            torch.addcmul(written[n], s[n], now.keep, out=s[n + 1])
            torch.addcmul(tallied[n], z[n], now.keep[..., 0], out=z[n + 1])
        if p is not None:
            assert now.read is not None
            assert now.decay is not None
            s[n + 1].addcmul_(p[n], now.read)
            torch.addcmul(pushed[n], p[n], now.decay, out=p[n + 1])
    return states


def go_back(after: Memory, read: Memory, w: Weights) -> Memory:
    """Gradients of the states before each chunk and after the last: the transpose of `advance`.

    after: of the state after the section; read: what the chunks' queries add.
    """
    number = read.s.shape[0]
    grads = _room(after, number)
    s, p, z = grads
    s[number], z[number] = after.s, after.z
    if p is not None:
        assert after.p is not None
        p[number] = after.p
    for n in reversed(range(number)):
        now = turn(w, n)
        if now.keep is None:
            torch.add(read.s[n], s[n + 1], out=s[n])
            torch.add(read.z[n], z[n + 1], out=z[n])
        else:
            torch.addcmul(read.s[n], s[n + 1], now.keep, out=s[n])
            torch.addcmul(read.z[n], z[n + 1], now.keep[..., 0], out=z[n])
        if p is not None:
            assert read.p is not None
            assert now.read is not None
            assert now.decay is not None
            torch.addcmul(read.p[n], p[n + 1], now.decay, out=p[n])
            p[n].addcmul_(s[n + 1], now.read)
    return grads


def _room(like: Memory, number: int) -> Memory:
    """Memory for N + 1 states."""
    s, p, z = like
    return Memory(
        s.new_empty(number + 1, *s.shape),
        None if p is None else p.new_empty(number + 1, *p.shape),
        z.new_empty(number + 1, *z.shape),
    )
