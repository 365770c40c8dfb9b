"""What a forward pass knows beside its tokens: padding, positions, keys and values so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.errors import ConfigError
from polyak.nn.cache import Cache
from polyak.nn.config import ModelConfig


@dataclass
class Context:
    """Passed through the blocks to attention; made anew for every forward pass.

    Attributes:
        past: tokens cached before these.
        length: S, keys that there are to attend to: the cached and these.
        positions: (B, T) or (1, T); None for past, past + 1, …
        mask: which keys a query may see, (B or 1, 1, T, S) bool; None for all, or, in a causal
            model with nothing cached, those up to its own.
        cache: where keys and values are kept.
        slot: the next call of attention is the slot-th of this pass.
        rotary: cosines and sines for `positions`; made by the first layer for all.
    """

    past: int = 0
    length: int = 0
    positions: Tensor | None = None
    mask: Tensor | None = None
    cache: Cache | None = None
    slot: int = 0
    rotary: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) with those cached before them, (B, H, S, D)."""
        if self.cache is None:
            return keys, values
        keys, values = self.cache.update(keys, values, self.slot)
        self.slot += 1
        # a cache of fixed size returns room that is not filled yet, too
        return keys[:, :, : self.length], values[:, :, : self.length]


def context_of(
    config: ModelConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> Context | None:
    """The context of a forward pass; None where learned positions count from 0, without padding.

    Raises:
        ConfigError: the sequence is longer than the model's context, a shape or position does
            not fit, or a model that is not causal is given a cache.
    """
    batch, length = input_ids.shape
    past = 0 if cache is None else int(cache.get_seq_length())
    total = past + length
    if total > config.context_length:
        cached = f" ({past} of them cached)" if past else ""
        raise ConfigError(
            f"a sequence of {total} tokens{cached} is longer than "
            f"context_length={config.context_length}; shorten it"
        )
    if attention_mask is None and position_ids is None and cache is None:
        # layers share the table of rotary positions through it
        return None if config.positions == "learned" else Context(length=length)
    if cache is not None and not config.causal:
        raise ConfigError(
            "cache: earlier tokens of a model with causal=False see later ones, so their keys "
            "and values cannot be kept; leave cache out"
        )
    mask = None
    if attention_mask is not None:
        if attention_mask.shape != (batch, total):
            raise ConfigError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids"
                f"{f' after {past} cached tokens' if past else ''} need {(batch, total)}"
            )
        real = attention_mask.to(torch.bool)
        if position_ids is None:
            # the first real token is at position 0, wherever padding put it
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        mask = _mask(real[:, None, None, :], past, length, causal=config.causal)
    elif past and length > 1:
        mask = _triangle(past, length, input_ids.device)
    if position_ids is not None:
        _check_positions(position_ids, batch, length, config)
    return Context(past, total, position_ids, mask, cache)


def _triangle(past: int, length: int, device: torch.device) -> Tensor:
    """Keys up to the query's own, (T, S)."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _mask(real: Tensor, past: int, length: int, *, causal: bool) -> Tensor:
    """Real keys, (B, 1, T, S); and every query's own, so that no softmax is over nothing."""
    if not causal:
        own = torch.eye(length, dtype=torch.bool, device=real.device)
        return real | own
    triangle = _triangle(past, length, real.device)
    return (real & triangle) | (triangle & ~triangle.tril(past - 1))


def _check_positions(position_ids: Tensor, batch: int, length: int, config: ModelConfig) -> None:
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ConfigError(
            f"position_ids has shape {tuple(position_ids.shape)}, but input_ids need "
            f"{(batch, length)}"
        )
    # on a GPU, reading values would wait for it; there the look-up itself fails
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and length:
        low, high = (int(end) for end in position_ids.aminmax())
        if low < 0 or high >= config.context_length:
            raise ConfigError(
                f"position_ids run from {low} to {high}; a model of "
                f"context_length={config.context_length} has 0 to {config.context_length - 1}"
            )
