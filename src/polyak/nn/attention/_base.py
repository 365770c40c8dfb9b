r"""`Attention`: projections, norms and positions around what a kind of attention computes.

O(x) = attention(LN x), (B, T, d) → (B, T, d); an update rule adds it to the residual stream in
its own way.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.errors import AttentionError
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context
from polyak.nn.norms import head_norm, norm
from polyak.nn.rotary import rotary_table, rotate


class Attention(nn.Module):
    r"""Multi-head attention of LN(x), with fused query, key and value projections.

    What is common to all kinds; a kind defines `attend`. H query heads share H_kv heads of keys
    and values, H/H_kv neighbours each; with rotary positions, queries and keys are turned, after
    their own norms where there are any. Weights qkv ((H + 2H_kv)·D, d), queries first, then keys,
    then values; and out (d, H·D).
    """

    name: ClassVar[str] = ""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, bias = config.d_model, config.bias if config.qkv_bias is None else config.qkv_bias
        self.num_heads, self.causal, self.dropout = config.num_heads, config.causal, config.dropout
        self.num_kv_heads, self.head_dim = config.kv_heads, config.head_width
        self.rope_theta = config.rope_theta if config.positions == "rope" else None
        self.rope_scaling = config.rope_scaling
        self.norm = norm(config)
        self.qkv = nn.Linear(d, config.qkv_width, bias=bias)
        self.q_norm = head_norm(config) if config.qk_norm else None
        self.k_norm = head_norm(config) if config.qk_norm else None
        self.out = nn.Linear(config.heads_width, d, bias=config.bias)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, T, d) → (B, T, d); with a context, padding is not seen and cached keys are."""
        dropout = self.dropout if self.training else 0.0
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            table = self._table(x, context)
            q, k = rotate(q, table), rotate(k, table)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        y = self.attend(q, k, v, context, dropout)
        return F.dropout(self.out(y.transpose(1, 2).flatten(-2)), dropout)

    def _table(self, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these tokens' positions, the same in every layer of a pass."""
        assert self.rope_theta is not None
        if context is not None and context.rotary is not None:
            return context.rotary
        start = 0 if context is None else context.past
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        if context is not None and context.positions is not None:
            positions = context.positions
        table = rotary_table(positions, self.head_dim, self.rope_theta, x.dtype, self.rope_scaling)
        if context is not None:
            context.rotary = table
        return table

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context | None, dropout: float
    ) -> Tensor:
        """What each query reads.

        Args:
            q: queries (B, H, T, D).
            k: keys (B, H_kv, T, D).
            v: values (B, H_kv, T, D).
            context: padding and what is cached; None for whole sequences.
            dropout: probability of dropping attention weights.

        Returns:
            (B, H, T, D).
        """
        raise AttentionError(f"{type(self).__name__} defines no attend(self, q, k, v, ...)")
