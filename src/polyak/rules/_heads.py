"""A token seen as a matrix: d reshaped to (heads, head_dim), for the matrix rules."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, d) → (B, T, H, D), a view."""
    y: Tensor = x.unflatten(-1, (num_heads, -1))  # type: ignore[no-untyped-call]
    return y


def merge_heads(y: Tensor) -> Tensor:
    """(B, T, H, D) → (B, T, d)."""
    return y.flatten(-2)
