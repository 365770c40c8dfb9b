r"""Rotary position embedding (arXiv:2104.09864), in the layout of Llama's released weights.

Dimensions i and i + D/2 of a head are the two coordinates of a point in the plane, turned by the
angle position·θ^{−2i/D}; so a query and a key meet at an angle that depends on their distance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (…, T, 1, D/2) for positions (…, T), in float32 or better."""
    exact = torch.promote_types(dtype, torch.float32)
    places = torch.arange(0, head_dim, 2, dtype=exact, device=positions.device)
    angles = positions.to(exact)[..., None, None] / theta ** (places / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head of x (B, T, H, D) by its position's angles."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
