"""x and a rule's streams as one vector for each token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class States:
    """Packs x and a rule's streams into (T, c) and back."""

    def __init__(self, x: Tensor, state: Any) -> None:
        self.kind, self.d = type(state), x.shape[-1]
        self.names = tuple(state._fields)
        self.matrices = {name: getattr(state, name).dim() == 4 for name in self.names}
        self.head_dim = next(
            (getattr(state, name).shape[-1] for name in self.names if self.matrices[name]), 0
        )
        upper = torch.triu_indices(self.head_dim, self.head_dim)
        self.upper = upper
        self.scale = torch.where(upper[0] == upper[1], 1.0, math.sqrt(2.0)).to(x)

    def pack(self, x: Tensor, state: Any) -> Tensor:
        """x (1, T, d) and the streams → (T, c)."""
        parts = [x[0]]
        for name in self.names:
            value = getattr(state, name)[0]
            if self.matrices[name]:
                value = value[:, self.upper[0], self.upper[1]] * self.scale
            parts.append(value)
        return torch.cat(parts, dim=-1)

    def unpack(self, z: Tensor) -> tuple[Tensor, Any]:
        """(T, c) → x (1, T, d) and the streams."""
        widths = [self.d, *(self.width(name) for name in self.names)]
        x, *values = torch.split(z, widths, dim=-1)
        for place, name in enumerate(self.names):
            if self.matrices[name]:
                values[place] = self._matrix(values[place])
        return x[None], self.kind(*(value[None] for value in values))

    def _matrix(self, flat: Tensor) -> Tensor:
        flat = flat / self.scale
        size = self.head_dim
        place = torch.empty(size, size, dtype=torch.long)
        place[self.upper[0], self.upper[1]] = torch.arange(len(self.scale))
        place[self.upper[1], self.upper[0]] = torch.arange(len(self.scale))
        return flat[:, place.flatten()].unflatten(-1, (size, size))  # type: ignore[no-untyped-call, no-any-return]

    def width(self, name: str) -> int:
        """Coordinates of one stream."""
        return len(self.scale) if self.matrices[name] else self.d

    def places(self) -> Iterator[tuple[str, slice]]:
        """Each vector stream with its place among the coordinates."""
        start = self.d
        for name in self.names:
            if not self.matrices[name]:
                yield name, slice(start, start + self.d)
            start += self.width(name)
