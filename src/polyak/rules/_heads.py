"""A token seen as a matrix: d reshaped to (heads, head_dim), for the matrix rules."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, d) → (B, T, H, D), a view."""
    return x.unflatten(-1, (num_heads, -1))


def merge_heads(y: Tensor) -> Tensor:
    """(B, T, H, D) → (B, T, d)."""
    return y.flatten(-2)
