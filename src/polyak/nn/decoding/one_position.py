"""Positions of one token at a time, read off tables: for `polyak.nn.decoding.one_token`."""

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
        self._module, self._length = module, length
        self._part, self._table = 0, self._tabulated(0)
        cos, _ = self._table
        turned = module.num_heads + module.num_kv_heads
        shape = turned + module.num_kv_heads, 1, module.head_dim
        self._cos, self._sin = cos.new_ones(shape), cos.new_zeros(shape)
        self._turned = self._cos[:turned], self._sin[:turned]
        self._half = module.head_dim // 2

    def _tabulated(self, part: int) -> tuple[Tensor, Tensor]:
        """Angles of the `length` positions from part·length on, (length, 1, D) each."""
        module, first = self._module, part * self._length
        weight: Tensor = module.qkv.weight
        places = torch.arange(first, first + self._length, device=weight.device)
        assert module.rope_theta is not None
        cos, sin = rotary_table(
            places, module.head_dim, module.rope_theta, weight.dtype, module.rope_scaling
        )
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def to(self, position: int) -> None:
        """Angles for heads until the next call."""
        if self._table is None:
            return
        part, place = divmod(position, self._length)
        if part != self._part:  # beyond the context
            self._part, self._table = part, self._tabulated(part)
        for values, table in zip(self._turned, self._table, strict=True):
            values.copy_(table[place])

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
