"""Where one token's x and streams start: what `Transformer.start` computes of a single token."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.nn.decoding.one_position import Sinusoids
from polyak.nn.decoding.ready import ready_norm
from polyak.nn.embedding import Embedding
from polyak.nn.transformer import Transformer

Start = Callable[[Tensor, int, Tensor], Tensor]
"""From ids, position and x₀ to a stream's start."""


def starts_of(model: Transformer) -> list[tuple[str, Start]]:
    """Each stream's name, and its start."""
    example = model.head.weight[None, :1]
    starts: list[tuple[str, Start]] = []
    for stream in model.placement.streams:
        if stream.name in model.streams:
            start = _table(model.streams[stream.name])  # type: ignore[arg-type]
        elif stream.name in model.starts:
            start = _from_x(ready_norm(model.starts[stream.name]))
        elif stream.start == "embedding":
            start = _constant(torch.zeros_like(example))
        else:
            start = _constant(stream.constant(example, model.config.num_heads))
        starts.append((stream.name, start))
    return starts


def lookup(table: Embedding) -> Callable[[Tensor, int], Tensor]:
    """From ids and position to the table's vector, (1, 1, d)."""
    found = _summed(table)
    return found if table.norm == "none" else lambda ids, at: table.normed(found(ids, at))


def _summed(table: Embedding) -> Callable[[Tensor, int], Tensor]:
    tokens = table.tokens.weight
    if table.position_mix is not None:
        rows = Sinusoids(table)
        return lambda ids, position: table.mix(F.embedding(ids, tokens), rows(position))
    if table.positions is None:
        return lambda ids, position: F.embedding(ids, tokens)
    positions = table.positions.weight
    return lambda ids, position: F.embedding(ids, tokens) + positions.narrow(0, position, 1)


def _table(table: Embedding) -> Start:
    found = lookup(table)
    return lambda ids, position, x: found(ids, position)


def _from_x(norm: Callable[[Tensor], Tensor]) -> Start:
    return lambda ids, position, x: norm(x)


def _constant(value: Tensor) -> Start:
    return lambda ids, position, x: value
