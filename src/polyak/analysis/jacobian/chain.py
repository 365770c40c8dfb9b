r"""Causal linear maps kept in pieces: products, transposed products, and solves.

A `Chain` is Q_outᵀ P_n ⋯ P_1 Q_in, with pieces P (see `cut`) and bases Q of every token's
input and output. It is block lower-triangular over positions, J_ij = 0 for j > i, and no block
below the diagonal is ever formed. A solve is forward substitution, token by token and
through all pieces at once: token i's earlier tokens are known, hence what attention adds at every
piece; what remains is the small system of the diagonal block J_ii. A transposed solve goes
from the last token to the first. Memory is O(T c²) a piece, not O(T² c²).

Vectors are (T, n, m): m of them side by side, n numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from polyak.analysis.jacobian.cut import Attention, Piece
from polyak.analysis.jacobian.linear import Linear


class Chain(Linear):
    """Q_outᵀ P_n ⋯ P_1 Q_in.

    Args:
        pieces: the P, the first to be applied first.
        enter: Q_in (T, c_in, n_in); None for the identity.
        leave: Q_out (T, c_out, n_out); None for the identity.
    """

    def __init__(
        self, pieces: Sequence[Piece], enter: Tensor | None = None, leave: Tensor | None = None
    ) -> None:
        self.pieces = list(pieces)
        first, last = self.pieces[0].diagonal, self.pieces[-1].diagonal
        super().__init__(first.shape[0], first.shape[2], last.shape[1], first, enter, leave)

    @property
    def bytes(self) -> int:
        """Memory of the pieces."""
        return sum(piece.bytes for piece in self.pieces)

    def times(self, z: Tensor) -> Tensor:
        """J z: (T, n_in, m) → (T, n_out, m)."""
        z = z if self.enter is None else self.enter @ z
        for piece in self.pieces:
            z = _times(piece, z)
        return z if self.leave is None else self.leave.transpose(1, 2) @ z

    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀ u: (T, n_out, m) → (T, n_in, m)."""
        u = u if self.leave is None else self.leave @ u
        for piece in reversed(self.pieces):
            u = _transposed(piece, u)
        return u if self.enter is None else self.enter.transpose(1, 2) @ u

    def with_bases(self, enter: Tensor | None, leave: Tensor | None) -> Chain:
        """The same pieces between other bases."""
        return Chain(self.pieces, enter, leave)

    @cached_property
    def before(self) -> list[Tensor]:
        """For every piece, how its input depends on the same token's input of the chain."""
        identity = torch.eye(self.inputs, dtype=self.like.dtype, device=self.like.device)
        made = [identity.expand(self.tokens, -1, -1) if self.enter is None else self.enter]
        for piece in self.pieces[:-1]:
            made.append(piece.diagonal @ made[-1])
        return made

    @cached_property
    def after(self) -> list[Tensor]:
        """For every piece, how the same token's output of the chain depends on its output."""
        identity = torch.eye(self.outputs, dtype=self.like.dtype, device=self.like.device)
        made = [
            identity.expand(self.tokens, -1, -1)
            if self.leave is None
            else self.leave.transpose(1, 2)
        ]
        for piece in reversed(self.pieces[1:]):
            made.append(made[-1] @ piece.diagonal)
        return made[::-1]

    @cached_property
    def diagonal(self) -> Tensor:
        """The diagonal blocks J_ii, (T, n_out, n_in)."""
        return self.after[-1] @ self.pieces[-1].diagonal @ self.before[-1]

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        assert self.inputs == self.outputs, "only a square chain can be solved with"
        factors: tuple[Tensor, Tensor] = torch.linalg.lu_factor_ex(self.diagonal)[:2]
        return factors

    def solve(self, b: Tensor) -> Tensor:
        """x with J x = b, both (T, n, m); not finite where a diagonal block is singular."""
        x = torch.empty_like(b)
        seen = [_Seen(piece.attention, b) for piece in self.pieces]
        leave = None if self.leave is None else self.leave.transpose(1, 2)
        for i in range(self.tokens):
            state: Tensor | None = None  # what earlier tokens alone cause in this one
            states: list[Tensor | None] = []
            for piece, past in zip(self.pieces, seen, strict=True):
                states.append(state)
                state = None if state is None else piece.diagonal[i] @ state
                if i and piece.attention is not None:
                    caused = piece.attention.out_of[i] @ past.given(i)
                    state = caused if state is None else state + caused
            right = b[i]
            if state is not None:
                right = right - (state if leave is None else leave[i] @ state)
            x[i] = self._solved(i, right, transpose=False)
            for before, known, past in zip(self.before, states, seen, strict=True):
                own = before[i] @ x[i]
                past.keep(i, own if known is None else own + known)
        return x

    def solve_transposed(self, b: Tensor) -> Tensor:
        """u with Jᵀ u = b, both (T, n, m)."""
        u = torch.empty_like(b)
        seen = [_Asked(piece.attention, b) for piece in self.pieces]
        for i in reversed(range(self.tokens)):
            state: Tensor | None = None
            states: list[Tensor | None] = []
            for piece, later in zip(reversed(self.pieces), reversed(seen), strict=True):
                states.append(state)
                state = None if state is None else piece.diagonal[i].T @ state
                if i + 1 < self.tokens and piece.attention is not None:
                    caused = piece.attention.into[i].T @ later.given(i)
                    state = caused if state is None else state + caused
            right = b[i]
            if state is not None:
                right = right - (state if self.enter is None else self.enter[i].T @ state)
            u[i] = self._solved(i, right, transpose=True)
            for after, known, later in zip(self.after, reversed(states), seen, strict=True):
                own = after[i].T @ u[i]
                later.keep(i, own if known is None else own + known)
        return u

    def _solved(self, i: int, right: Tensor, *, transpose: bool) -> Tensor:
        lu, pivots = self._factors
        solved: Tensor = torch.linalg.lu_solve(lu[i], pivots[i], right, adjoint=transpose)
        return solved


def _times(piece: Piece, z: Tensor) -> Tensor:
    """One piece times (T, c_in, m)."""
    y = piece.diagonal @ z
    if piece.attention is None:
        return y
    a = piece.attention
    dk, dv = _parts(a, a.into @ z)  # (H, m, T, D), (H, m, T, V)
    scores = a.q[:, None] @ dk.transpose(-2, -1)
    do = (a.of_values[:, None] * scores) @ a.v[:, None]
    do = do - (a.of_outputs[:, None] * scores).sum(-1, keepdim=True) * a.o[:, None]
    do = do + a.weights[:, None] @ dv
    return y + a.out_of @ do.permute(2, 0, 3, 1).flatten(1, 2)


def _transposed(piece: Piece, u: Tensor) -> Tensor:
    """The transpose of one piece times (T, c_out, m)."""
    z = piece.diagonal.transpose(1, 2) @ u
    if piece.attention is None:
        return z
    a = piece.attention
    do = (a.out_of.transpose(1, 2) @ u).unflatten(1, (a.v.shape[0], -1)).permute(1, 3, 0, 2)  # type: ignore[no-untyped-call]
    along = a.of_values[:, None] * (do @ a.v[:, None].transpose(-2, -1))
    along = along - a.of_outputs[:, None] * (do * a.o[:, None]).sum(-1, keepdim=True)
    dk = along.transpose(-2, -1) @ a.q[:, None]
    dv = a.weights[:, None].transpose(-2, -1) @ do
    both = [part.permute(2, 0, 3, 1).flatten(1, 2) for part in (dk, dv)]
    return z + a.into.transpose(1, 2) @ torch.cat(both, dim=1)


def _parts(a: Attention, kv: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H·(D + V), m) → dk (H, m, T, D) and dv (H, m, T, V)."""
    heads, _, width = a.q.shape
    k, v = torch.split(kv, [heads * width, heads * a.v.shape[2]], dim=1)
    dk, dv = (
        part.unflatten(1, (heads, -1)).permute(1, 3, 0, 2)  # type: ignore[no-untyped-call]
        for part in (k, v)
    )
    return dk, dv


class _Seen:
    """Changes of keys and values of the tokens solved so far, as attention sees them."""

    def __init__(self, attention: Attention | None, like: Tensor) -> None:
        self.attention = attention
        if attention is not None:
            heads, tokens, width = attention.q.shape
            count = like.shape[2]
            self.dk = like.new_empty(heads, count, tokens, width)
            self.dv = like.new_empty(heads, count, tokens, attention.v.shape[2])

    def given(self, i: int) -> Tensor:
        """Token i's do from tokens before it, (H·V, m)."""
        a = self.attention
        assert a is not None
        scores = (self.dk[:, :, :i] @ a.q[:, None, i, :, None]).squeeze(-1)
        do = (scores * a.of_values[:, None, i, :i]) @ a.v[:, :i]
        do = do - (scores * a.of_outputs[:, None, i, :i]).sum(-1, keepdim=True) * a.o[:, None, i]
        do = do + (a.weights[:, None, None, i, :i] @ self.dv[:, :, :i]).squeeze(-2)
        return do.transpose(1, 2).flatten(0, 1)

    def keep(self, i: int, state: Tensor) -> None:
        """Token i's own change of the piece's input, (c_in, m)."""
        a = self.attention
        if a is None:
            return
        heads, _, width = a.q.shape
        kv = (a.into[i] @ state).T  # (m, H·(D + V))
        self.dk[:, :, i] = kv[:, : heads * width].unflatten(1, (heads, -1)).transpose(0, 1)  # type: ignore[no-untyped-call]
        self.dv[:, :, i] = kv[:, heads * width :].unflatten(1, (heads, -1)).transpose(0, 1)  # type: ignore[no-untyped-call]


class _Asked:
    """What the tokens solved so far, later ones, ask of keys and values before them."""

    def __init__(self, attention: Attention | None, like: Tensor) -> None:
        self.attention = attention
        if attention is not None:
            heads, tokens, width = attention.q.shape
            count = like.shape[2]
            self.dk = like.new_zeros(heads, count, tokens, width)
            self.dv = like.new_zeros(heads, count, tokens, attention.v.shape[2])

    def given(self, i: int) -> Tensor:
        """What is asked of token i, (H·(D + V), m)."""
        both = [part[:, :, i].transpose(1, 2).flatten(0, 1) for part in (self.dk, self.dv)]
        return torch.cat(both)

    def keep(self, i: int, state: Tensor) -> None:
        """Token i's own change of the piece's output, (c_out, m)."""
        a = self.attention
        if a is None or not i:
            return
        do = (a.out_of[i].T @ state).unflatten(0, (a.v.shape[0], -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        weights = a.weights[:, None, i, :i]  # (H, 1, i)
        along = a.of_values[:, None, i, :i] * (do @ a.v[:, :i].transpose(1, 2))
        sums = (do * a.o[:, None, i]).sum(-1, keepdim=True)
        along = along - a.of_outputs[:, None, i, :i] * sums
        self.dv[:, :, :i] += weights[..., None] * do[:, :, None]
        self.dk[:, :, :i] += along[..., None] * a.q[:, None, None, i]
