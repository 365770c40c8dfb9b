r"""Rotary position embedding (arXiv:2104.09864), in the layout of Llama's released weights.

Dimensions i and i + D/2 of a head are the two coordinates of a point in the plane, turned by the
angle position·f_i, f_i = θ^{−2i/D}; so a query and a key meet at an angle that depends on their
distance. Llama 3.1 (arXiv:2407.21783) turns long wavelengths λ_i = 2π/f_i more slowly, for a longer
context than the first one, C: by 1/factor where λ_i > C/low, not at all where λ_i < C/high, and by
(1 − s)/factor + s with s = (C/λ_i − low)/(high − low) in between. Position interpolation
(arXiv:2306.15595) turns all of them more slowly, by 1/factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: tuple[float, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (…, T, 1, D/2) for positions (…, T), in float32 or better.

    `scaling`: factor, low, high, C, as above; or factor alone, for interpolation.
    """
    exact = torch.promote_types(dtype, torch.float32)
    places = torch.arange(0, head_dim, 2, dtype=exact, device=positions.device)
    slowness = theta ** (places / head_dim)
    if scaling is not None and len(scaling) == 1:
        slowness = slowness * scaling[0]
    elif scaling is not None:
        factor, low, high, first = scaling
        turns = first / (2 * math.pi * slowness)  # C/λ_i
        share = ((turns - low) / (high - low)).clamp(0, 1)
        slowness = slowness / ((1 - share) / factor + share)
    angles = positions.to(exact)[..., None, None] / slowness
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head of x (B, T, H, D) by its position's angles."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
