"""Positions of one token at a time, read off tables: for `polyak.nn.one_token`."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.nn.attention import Attention
from polyak.nn.embedding import Embedding
from polyak.nn.rotary import rotary_table
from polyak.nn.sinusoidal import sinusoids


class Turn:
    """Rotary positions: queries and keys turned by the token's angles, values by none."""

    def __init__(self, module: Attention, length: int) -> None:
        self._table: tuple[Tensor, Tensor] | None = None
        if module.rope_theta is None:
            return
        weight, d = module.qkv.weight, module.head_dim
        places = torch.arange(length, device=weight.device)
        cos, sin = rotary_table(places, d, module.rope_theta, weight.dtype, module.rope_scaling)
        self._table = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (length, 1, D)
        turned = module.num_heads + module.num_kv_heads
        shape = turned + module.num_kv_heads, 1, d
        self._cos, self._sin = cos.new_ones(shape), cos.new_zeros(shape)
        self._turned = self._cos[:turned], self._sin[:turned]
        self._half = d // 2

    def to(self, position: int) -> None:
        """Angles for heads until the next call."""
        if self._table is not None:
            for values, table in zip(self._turned, self._table, strict=True):
                values.copy_(table[position])

    def __call__(self, heads: Tensor) -> Tensor:
        """(heads, 1, D) → the same; queries, keys and values in this order."""
        swapped = heads.roll(self._half, -1)
        return torch.addcmul(heads * self._cos, swapped, self._sin)


class Sinusoids:
    """A position's sines and cosines, (1, w), from a table of the positions around it."""

    ROWS = 1024

    def __init__(self, table: Embedding) -> None:
        self._width, self._like = table.sinusoid_width, table.tokens.weight
        self._from, self._table = -self.ROWS, self._like

    def __call__(self, position: int) -> Tensor:
        """Those of one position."""
        if not 0 <= position - self._from < self.ROWS:
            self._from = position
            at = torch.arange(position, position + self.ROWS, device=self._like.device)
            self._table = sinusoids(at, self._width, self._like.dtype)
        return self._table.narrow(0, position - self._from, 1)
