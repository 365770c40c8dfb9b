"""What a forward pass knows beside its tokens: padding, positions, keys and values so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.errors import ConfigError
from polyak.nn.cache import Cache, StateCache, check_rows
from polyak.nn.config import ModelConfig


@dataclass
class Context:
    """Passed through the blocks to attention; made anew for every forward pass.

    Attributes:
        past: tokens cached before these.
        length: S, tokens that there are to attend to: the cached and these.
        positions: (B, T) or (1, T); None for past, past + 1, …
        real: which of the S tokens are real and no padding, (B, S) bool; None for all.
        causal: a token sees itself and earlier ones only.
        cache: where keys and values, or states, are kept.
        slot: the next call of attention is the slot-th of this pass.
        rotary: cosines and sines for `positions`; made by the first layer for all.
        shared: raw parameters that the kind of attention learns one of for the whole model.
    """

    past: int = 0
    length: int = 0
    positions: Tensor | None = None
    real: Tensor | None = None
    causal: bool = True
    cache: Cache | None = None
    slot: int = 0
    rotary: tuple[Tensor, Tensor] | None = None
    shared: Mapping[str, Tensor] | None = None
    _pairs: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) with those cached before them, (B, H, S, D)."""
        if self.cache is None:
            return keys, values
        keys, values = self.cache.update(keys, values, self.slot)
        self.slot += 1
        # a cache of fixed size returns room that is not filled yet, too
        return keys[:, :, : self.length], values[:, :, : self.length]

    def recall(self, rows: int) -> Any:
        """What this call of attention remembered of the tokens before; None at the beginning.

        Args:
            rows: B, which must be the state's.

        Raises:
            ConfigError: the cache keeps keys and values only, or holds another batch.
        """
        if not hasattr(self.cache, "recall"):
            raise ConfigError(
                f"cache: a {type(self.cache).__name__} keeps keys and values, and this model's "
                "attention remembers a state; use polyak.nn.cache.KeyValueCache, or with "
                "transformers leave past_key_values out"
            )
        cache: StateCache = self.cache  # type: ignore[assignment]  # it has the method
        state = cache.recall(self.slot)
        if state is not None:
            check_rows(state[0].shape[0], rows)
        return state

    def remember(self, state: Any, tokens: int) -> None:
        """Keep this call's new state, a tuple of tensors, after so many more tokens."""
        assert self.cache is not None, "recall comes first"
        cache: StateCache = self.cache  # type: ignore[assignment]  # as `recall` saw
        cache.remember(state, self.slot, tokens)
        self.slot += 1

    def real_keys(self, tokens: int) -> Tensor | None:
        """Which of the last so many tokens are real, (B, tokens); None for all."""
        return None if self.real is None else self.real[:, -tokens:]

    def visible(self, device: torch.device) -> Tensor | None:
        """Which keys a query may see, (B or 1, 1, T, S) bool; made by the first layer for all.

        None for all, or, in a causal model with nothing cached, those up to its own. A query sees
        its own key even where that is padding, so that no softmax is over nothing.
        """
        tokens = self.length - self.past
        if self._pairs is None and self.real is not None:
            own = _triangle(self.past, tokens, device)
            if self.causal:
                own = own & ~own.tril(self.past - 1)
                seen = self.real[:, None, None] & _triangle(self.past, tokens, device)
            else:
                own = own & own.triu()
                seen = self.real[:, None, None]
            self._pairs = seen | own
        elif self._pairs is None and self.past and tokens > 1:
            self._pairs = _triangle(self.past, tokens, device)
        return self._pairs


def context_of(
    config: ModelConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    *,
    longest: int | None,
    shared: Mapping[str, Tensor] | None = None,
) -> Context | None:
    """The context of a forward pass; None where there is nothing to say: see `Transformer`.

    Args:
        config: the model.
        input_ids: as those of `Transformer.forward`, and so the three that follow.
        attention_mask: see there.
        position_ids: see there.
        cache: see there.
        longest: most tokens that the model can see; None: there is no limit.
        shared: see `Context`.

    Raises:
        ConfigError: the sequence is longer than the model's context, a shape or position does
            not fit, or a model that is not causal is given a cache.
    """
    batch, length = input_ids.shape
    past = 0 if cache is None else int(cache.get_seq_length())
    total = past + length
    if longest is not None and total > longest:
        cached = f" ({past} of them cached)" if past else ""
        raise ConfigError(
            f"a sequence of {total} tokens{cached} is longer than "
            f"context_length={config.context_length}; shorten it"
        )
    if attention_mask is None and position_ids is None and cache is None:
        if config.positions != "rope" and shared is None:
            return None
        # layers share the table of rotary positions through it
        return Context(length=length, causal=config.causal, shared=shared)
    if cache is not None and not config.causal:
        raise ConfigError(
            "cache: earlier tokens of a model with causal=False see later ones, so their keys "
            "and values cannot be kept; leave cache out"
        )
    real = None
    if attention_mask is not None:
        if attention_mask.shape != (batch, total):
            pairs = attention_mask.dim() > 2 and config.attention != "softmax"
            raise ConfigError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids"
                f"{f' after {past} cached tokens' if past else ''} need {(batch, total)}"
                + (f": attention={config.attention} can leave out tokens, not pairs" * pairs)
            )
        real = attention_mask.to(torch.bool)
        if position_ids is None:
            # the first real token is at position 0, wherever padding put it
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    if position_ids is not None:
        _check_positions(position_ids, batch, length, config, longest)
    return Context(past, total, position_ids, real, config.causal, cache, shared=shared)


def places(length: int, device: torch.device, context: Context | None = None) -> Tensor:
    """Positions of so many tokens: (B, T) or (T,), counted from 0 unless the context says else."""
    if context is not None and context.positions is not None:
        return context.positions
    past = 0 if context is None else context.past
    return torch.arange(past, past + length, device=device)


def _triangle(past: int, length: int, device: torch.device) -> Tensor:
    """Keys up to the query's own, (T, S)."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _check_positions(
    position_ids: Tensor, batch: int, length: int, config: ModelConfig, longest: int | None
) -> None:
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ConfigError(
            f"position_ids has shape {tuple(position_ids.shape)}, but input_ids need "
            f"{(batch, length)}"
        )
    # on a GPU, reading values would wait for it; there the look-up itself fails
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and length:
        low, high = (int(end) for end in position_ids.aminmax())
        if low < 0 or (longest is not None and high >= longest):
            raise ConfigError(
                f"position_ids run from {low} to {high}; a model of "
                f"context_length={config.context_length} has 0 to {config.context_length - 1}"
            )
