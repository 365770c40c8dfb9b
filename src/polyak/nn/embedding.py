"""`Embedding`: from token ids to what x or a stream starts from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.nn.config import ModelConfig
from polyak.nn.context import Context, places
from polyak.nn.controls import REINJECTED
from polyak.nn.norms import plain_norm
from polyak.nn.sinusoidal import sinusoids


class Embedding(nn.Module):
    """Token vectors and what is known of their positions, normed if asked: (B, T) ids → (B, T, d).

    Learned positions are a second table. Sinusoidal ones come into x alone: a stream's table has
    tokens only then, of width d, as with rotary positions or none.

    Args:
        config: the model's.
        stream: name of the auxiliary stream that starts here; None for x.
    """

    def __init__(self, config: ModelConfig, stream: str | None = None) -> None:
        super().__init__()
        d = config.stream_width
        width = config.token_width if stream is None else d
        norms = {None: config.embedding_norm, REINJECTED: config.norm}
        self.norm, self.norm_eps = norms.get(stream, "none"), config.norm_eps
        self.dropout = config.dropout
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = (
            nn.Embedding(config.context_length, d) if config.positions == "learned" else None
        )
        mixed = config.positions == "sinusoidal" and stream is None
        self.position_mix = config.position_mix if mixed else None
        self.sinusoid_width = d if width == d else d - width

    def forward(self, input_ids: Tensor, context: Context | None = None) -> Tensor:
        """Token and position vectors; positions count from 0 unless the context says else."""
        x = self.tokens(input_ids)
        if self.position_mix is not None:
            at = places(input_ids.shape[1], x.device, context)
            x = self.mix(x, sinusoids(at, self.sinusoid_width, x.dtype))
        elif self.positions is None:
            pass
        elif context is None:
            x = x + self.positions.weight[: input_ids.shape[1]]
        elif context.positions is None:
            x = x + self.positions.weight[context.past : context.length]
        else:
            x = x + self.positions(context.positions)
        return F.dropout(self.normed(x), self.dropout, self.training)

    def normed(self, x: Tensor) -> Tensor:
        """What the norm without parameters makes of the sum of tokens and positions."""
        return plain_norm(self.norm, x, self.norm_eps)

    def mix(self, x: Tensor, table: Tensor) -> Tensor:
        """Tokens (B, T, ·) with sinusoids (T, ·) or (B, T, ·): (B, T, d)."""
        if self.position_mix == "added":
            return x + table
        return torch.cat((x, table.expand(*x.shape[:-1], -1)), dim=-1)
