r"""Oracles: attention and the MLP, each with the pre-norm in front of it.

O(x) = attention(LN x) or mlp(LN x), (B, T, d) → (B, T, d); an update rule adds it to the
residual stream in its own way.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from polyak.nn.config import ModelConfig
from polyak.nn.context import Context
from polyak.nn.norms import norm


class Attention(nn.Module):
    r"""Multi-head softmax attention of LN(x), with fused query, key and value projections.

    softmax(QKᵀ/√D) V per head, causal if the model is; weights qkv (3d, d) and out (d, d).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.num_heads, self.causal, self.dropout = config.num_heads, config.causal, config.dropout
        self.norm = norm(config)
        self.qkv = nn.Linear(d, 3 * d, bias=config.bias)
        self.out = nn.Linear(d, d, bias=config.bias)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, T, d) → (B, T, d); with a context, padding is not seen and cached keys are."""
        dropout = self.dropout if self.training else 0.0
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mask, causal = None, self.causal
        if context is not None:
            k, v = context.extend(k, v)
            mask, causal = context.mask, causal and context.mask is None and not context.past
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
        )
        return F.dropout(self.out(y.transpose(1, 2).flatten(-2)), dropout)


class MLP(nn.Module):
    """down(gelu(up(LN x))), four times as wide inside; exact (erf) GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.dropout = config.dropout
        self.norm = norm(config)
        self.up = nn.Linear(d, 4 * d, bias=config.bias)
        self.down = nn.Linear(4 * d, d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        y = self.down(F.gelu(self.up(self.norm(x))))
        return F.dropout(y, self.dropout, self.training)
