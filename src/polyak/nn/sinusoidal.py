r"""Sinusoidal positions (arXiv:1706.03762), sines and cosines in turn as in arXiv:2208.00579.

Column 2m of position t is sin(t·10000^{−2m/w}), column 2m + 1 the cosine; w columns, t from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines (…, T, w) for positions (…, T); w is even.

    Computed in float32 or better, then rounded to `dtype`.
    """
    exact = torch.promote_types(dtype, torch.float32)
    places = torch.arange(0, width, 2, dtype=exact, device=positions.device)
    angles = positions.to(exact)[..., None] / 10000.0 ** (places / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)
