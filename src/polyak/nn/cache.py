"""Keys and values of the tokens seen so far, so that decoding runs on new tokens only."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from polyak.checks import check_whole
from polyak.errors import ConfigError


class Cache(Protocol):
    """What `Transformer` asks of a cache; transformers' `Cache` classes have it too."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> Any:
        """Append keys and values (B, H_kv, T, D) to a slot; return all of it (B, H_kv, ≥S, D)."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Number of tokens that a slot holds."""
        ...


class KeyValueCache:
    """A `Cache` in memory taken once: appending copies the new tokens only.

    A slot is one call of attention: slot i is the i-th call of a forward pass, so a rule that
    calls its oracle k times a step has k slots a layer. Streams need no cache, as no rule mixes
    tokens. Memory of a slot is taken when it is first written, in the keys' dtype and device.

    Args:
        length: most tokens a sequence can have; the model's context length is always enough.
    """

    def __init__(self, length: int) -> None:
        check_whole("length", length)
        self.length = length
        self._slots: list[tuple[Tensor, Tensor]] = []
        self._seen: list[int] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H_kv, T, D) to a slot; return all of its (B, H_kv, S, D).

        Further arguments, which some of transformers' models pass, are not needed.

        Raises:
            ConfigError: there is no room, the batch has another size, or gradients are wanted.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ConfigError("KeyValueCache keeps no gradients; decode under torch.no_grad()")
        if layer_idx >= len(self._slots):
            assert layer_idx == len(self._slots), f"slot {layer_idx} before {len(self._slots)}"
            self._slots.append((self._room(key_states), self._room(value_states)))
            self._seen.append(0)
        keys, values = self._slots[layer_idx]
        start = self._seen[layer_idx]
        end = start + key_states.shape[2]
        if end > self.length:
            raise ConfigError(f"a KeyValueCache of length={self.length} has no room for {end}")
        if keys.shape[0] != key_states.shape[0]:
            raise ConfigError(
                f"the cache holds {keys.shape[0]} sequences, not {key_states.shape[0]}; "
                "use a new cache for another batch, or select(rows)"
            )
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self._seen[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that a slot holds; 0 before it is written."""
        return self._seen[layer_idx] if layer_idx < len(self._seen) else 0

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order; an index may occur more than once."""
        self._slots = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self._slots]

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self._seen = [min(seen, length) for seen in self._seen]

    @property
    def slots(self) -> list[tuple[Tensor, Tensor]]:
        """Each slot's keys and values (B, H_kv, length, D), filled up to `get_seq_length`."""
        return list(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken."""
        return sum(k.nbytes + v.nbytes for k, v in self._slots)

    def _room(self, like: Tensor) -> Tensor:
        batch, heads, _, head_dim = like.shape
        return like.new_empty(batch, heads, self.length, head_dim)
