r"""Linear maps between states of T tokens that are never formed.

Vectors are (T, n, m): m of them side by side, n numbers a token.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp

from polyak.analysis._common import math_attention


class Linear(abc.ABC):
    """J: (T, inputs) → (T, outputs).

    Args:
        tokens: T.
        inputs: numbers a token goes in with.
        outputs: numbers a token comes out with.
        like: a tensor of the type and device to compute in.
        enter: basis of the inputs that count, (T, c, inputs); None for all.
        leave: basis of the outputs that count, (T, c', outputs); None for all.
    """

    def __init__(
        self,
        tokens: int,
        inputs: int,
        outputs: int,
        like: Tensor,
        enter: Tensor | None,
        leave: Tensor | None,
    ) -> None:
        self.tokens, self.like = tokens, like
        self.enter, self.leave = enter, leave
        self.inputs = inputs if enter is None else enter.shape[2]
        self.outputs = outputs if leave is None else leave.shape[2]

    @abc.abstractmethod
    def times(self, z: Tensor) -> Tensor:
        """J z: (T, inputs, m) → (T, outputs, m)."""

    @abc.abstractmethod
    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀ u: (T, outputs, m) → (T, inputs, m)."""

    @abc.abstractmethod
    def with_bases(self, enter: Tensor | None, leave: Tensor | None) -> Linear:
        """The same map between other bases."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.tokens * self.outputs, self.tokens * self.inputs

    @property
    def tall(self) -> bool:
        """Whether it has more rows than columns."""
        return self.outputs > self.inputs

    @property
    def side(self) -> int:
        """The smaller of inputs and outputs: T times it is the number of singular values."""
        return min(self.inputs, self.outputs)

    def gram(self, u: Tensor) -> Tensor:
        """G u with G = JJᵀ, or JᵀJ where J is tall; (T, side, m)."""
        return self.transposed(self.times(u)) if self.tall else self.times(self.transposed(u))

    def gain(self, u: Tensor) -> float:
        """‖Jᵀu‖/‖u‖, or ‖Ju‖/‖u‖ where J is tall: between σ_min and σ_max, whatever u is."""
        image = self.times(u) if self.tall else self.transposed(u)
        return float(image.norm() / u.norm())

    def random(self, size: int, count: int, generator: torch.Generator) -> Tensor:
        """`count` vectors of independent normal numbers, (T, size, count)."""
        drawn = torch.randn(self.tokens, size, count, generator=generator, dtype=torch.float64)
        return drawn.to(self.like)

    def dense(self) -> Tensor:
        """The matrix itself, rows and columns ordered by token; for small ones."""
        rows, columns = self.shape
        identity = torch.eye(columns, dtype=self.like.dtype, device=self.like.device)
        image = self.times(identity.reshape(self.tokens, self.inputs, columns))
        return image.reshape(rows, columns)

    def flat(self, operator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """An operator on (T, side, 1) as one on float64 vectors of T·side numbers."""

        def on_vectors(vector: Tensor) -> Tensor:
            z = vector.to(self.like).reshape(self.tokens, self.side, 1)
            return operator(z).reshape(-1).double()

        return on_vectors


class Free(Linear):
    """A derivative by automatic differentiation alone: slower, nothing kept, no solves.

    Args:
        function: (T, c) → (T, c').
        point: where to differentiate, (T, c).
        enter: as in `Linear`.
        leave: as in `Linear`.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        point: Tensor,
        enter: Tensor | None = None,
        leave: Tensor | None = None,
    ) -> None:
        self.function, self.point = function, point
        with math_attention():
            found = vjp(function, point)
        out, self._pull = found[0], found[1]
        tokens, inputs = point.shape
        super().__init__(tokens, inputs, out.shape[1], point, enter, leave)

    def times(self, z: Tensor) -> Tensor:
        """J z, a column at a time."""
        z = z if self.enter is None else self.enter @ z
        with math_attention():
            columns = [jvp(self.function, (self.point,), (c,))[1] for c in z.unbind(-1)]
        y = torch.stack(columns, dim=-1)
        return y if self.leave is None else self.leave.transpose(1, 2) @ y

    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀ u, a column at a time."""
        u = u if self.leave is None else self.leave @ u
        with math_attention():
            z = torch.stack([self._pull(c.contiguous())[0] for c in u.unbind(-1)], dim=-1)
        return z if self.enter is None else self.enter.transpose(1, 2) @ z

    def with_bases(self, enter: Tensor | None, leave: Tensor | None) -> Free:
        """The same map between other bases."""
        return Free(self.function, self.point, enter, leave)
