r"""Oracles: attention and the MLP, each with the pre-norm in front of it.

O(x) = attention(LN x) or mlp(LN x), (B, T, d) → (B, T, d); an update rule adds it to the
residual stream in its own way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.nn.config import Activation, ModelConfig
from polyak.nn.context import Context
from polyak.nn.norms import head_norm, norm
from polyak.nn.rotary import rotary_table, rotate

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class Attention(nn.Module):
    r"""Multi-head softmax attention of LN(x), with fused query, key and value projections.

    softmax(QKᵀ/√D) V per head, causal if the model is. H query heads share H_kv heads of keys
    and values, H/H_kv neighbours each; with rotary positions, queries and keys are turned, after
    their own norms where there are any. Weights qkv ((H + 2H_kv)·D, d), queries first, then keys,
    then values; and out (d, H·D).
    """

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
        y = self._attend(q, k, v, context, dropout)
        return F.dropout(self.out(y.transpose(1, 2).flatten(-2)), dropout)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context | None, dropout: float
    ) -> Tensor:
        mask, causal = None, self.causal
        if context is not None:
            k, v = context.extend(k, v)
            mask, causal = context.mask, causal and context.mask is None and not context.past
        if self.num_kv_heads == self.num_heads:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout
            )
        if q.shape[2] == 1:  # one token: the heads of a group are queries of one head
            y = F.scaled_dot_product_attention(
                q.reshape(q.shape[0], self.num_kv_heads, -1, self.head_dim),
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
            )
            return y.reshape(q.shape)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=True
        )

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


class MLP(nn.Module):
    """down(act(up(LN x))), or down(act(gate(LN x)) · up(LN x)) where the MLP is gated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.hidden_width
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation]
        self.norm = norm(config)
        self.gate = nn.Linear(d, width, bias=config.bias) if config.mlp == "gated" else None
        self.up = nn.Linear(d, width, bias=config.bias)
        self.down = nn.Linear(width, d, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        x = self.norm(x)
        if self.gate is None:
            y = self.activation(self.up(x))
        else:
            y = self.activation(self.gate(x)) * self.up(x)
        return F.dropout(self.down(y), self.dropout, self.training)
