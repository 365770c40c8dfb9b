r"""Softmax attention: every query reads a weighted mean of the values (arXiv:1706.03762)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from polyak.nn.attention import Attention, register
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context


@register("softmax")
class SoftmaxAttention(Attention):
    r"""softmax(QKᵀ/√D) V per head, causal if the model is."""

    equation = "o = softmax(QKᵀ/√D) V"
    paper = "arXiv:1706.03762"

    @classmethod
    def flops(cls, config: ModelConfig, tokens: int) -> tuple[int, int] | None:
        """Scores and their sums of values, over the whole square; see `Attention.flops`."""
        forward = 4 * tokens * tokens * config.heads_width
        return forward, 2 * forward

    @classmethod
    def decoding_flops(cls, config: ModelConfig, tokens: int) -> int | None:
        """See `Attention.decoding_flops`."""
        return 4 * tokens * config.heads_width

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context | None, dropout: float
    ) -> Tensor:
        """See `Attention.attend`."""
        mask, causal = None, self.causal
        if context is not None:
            k, v = context.extend(k, v)
            mask = context.visible(q.device)
            causal = causal and mask is None and not context.past
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
