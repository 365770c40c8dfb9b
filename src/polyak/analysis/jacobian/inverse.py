r"""The inverse of JJᵀ or JᵀJ for a causal J, by forward substitution.

A square J is solved with directly. Where a token has e more inputs than outputs (the first
block, whose streams start anywhere), split every token's inputs by orthonormal S and S⊥ with
J_ii S⊥ = 0. Then K = JS is square and causal, W = JS⊥ has eT columns only, and

    JJᵀ = KKᵀ + WWᵀ = K(I + ZZᵀ)Kᵀ,  Z = K⁻¹W,
    (JJᵀ)⁻¹ = K⁻ᵀ(I − Z(I + ZᵀZ)⁻¹Zᵀ)K⁻¹.

With more outputs than inputs the same holds for JᵀJ and Jᵀ. Nothing is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.analysis.jacobian.chain import Chain

COLUMNS = 32
"""Columns of W that are solved for at once."""
MOST_BYTES = 2 << 30
"""Largest Z that is made."""


class Inverse:
    """Applies the inverse of G, which is JJᵀ, or JᵀJ where J has more rows than columns.

    Args:
        chain: J.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.tall, self.side = chain.tall, chain.side
        extra = max(chain.outputs, chain.inputs) - self.side
        self.core = chain
        self.z: Tensor | None = None
        if extra:
            self._split(extra)

    @staticmethod
    def possible(chain: Chain) -> bool:
        """Whether Z is small enough to be made."""
        side, extra = sorted((chain.outputs, chain.inputs))
        size = chain.tokens**2 * (extra - side) * side * chain.like.element_size()
        return size <= MOST_BYTES

    def __call__(self, u: Tensor) -> Tensor:
        """G⁻¹ u, (T, side, m)."""
        core = self.core
        y = core.solve_transposed(u) if self.tall else core.solve(u)
        if self.z is not None:
            flat = y.flatten(0, 1)
            inner = torch.cholesky_solve(self.z.T @ flat, self.small)
            y = (flat - self.z @ inner).unflatten(0, y.shape[:2])  # type: ignore[no-untyped-call]
        return core.solve(y) if self.tall else core.solve_transposed(y)

    def _split(self, extra: int) -> None:
        chain = self.chain
        diagonal = chain.diagonal if self.tall else chain.diagonal.transpose(1, 2)
        basis = torch.linalg.qr(diagonal, mode="complete").Q
        kept, rest = basis[..., : self.side].contiguous(), basis[..., self.side :]
        if self.tall:
            leave = kept if chain.leave is None else chain.leave @ kept
            self.core = chain.with_bases(chain.enter, leave)
        else:
            enter = kept if chain.enter is None else chain.enter @ kept
            self.core = chain.with_bases(enter, chain.leave)
        columns = chain.tokens * extra
        z = chain.like.new_empty(chain.tokens * self.side, columns)
        for start in range(0, columns, COLUMNS):
            stop = min(start + COLUMNS, columns)
            unit = chain.like.new_zeros(chain.tokens, basis.shape[1], stop - start)
            for column in range(start, stop):
                token, which = divmod(column, extra)
                unit[token, :, column - start] = rest[token, :, which]
            if self.tall:
                solved = self.core.solve_transposed(chain.transposed(unit))
            else:
                solved = self.core.solve(chain.times(unit))
            z[:, start:stop] = solved.flatten(0, 1)
        self.z = z
        identity = torch.eye(columns, dtype=z.dtype, device=z.device)
        self.small = torch.linalg.cholesky_ex(identity + z.T @ z).L
