"""What attention keeps of the tokens seen so far, so that decoding runs on new tokens only."""

from __future__ import annotations

from collections.abc import Iterator
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


class StateCache(Protocol):
    """What kinds of attention that remember a state of constant size ask of a cache besides."""

    def recall(self, layer_idx: int) -> Any:
        """A slot's state; None before it is first kept."""
        ...

    def remember(self, state: Any, layer_idx: int, tokens: int) -> None:
        """Keep a slot's new state, after so many more tokens."""
        ...


class KeyValueCache:
    """A `Cache` in memory taken once: appending copies the new tokens only.

    A slot is one call of attention: slot i is the i-th call of a forward pass, so a rule that
    calls its oracle k times a step has k slots a layer. Streams need no cache, as no rule mixes
    tokens. Memory of a slot is taken when it is first written, in the keys' dtype and device.

    A slot of attention that remembers a state holds that instead, a tuple of tensors (or None)
    whose first dimension is the batch; it is replaced by the next one and never written into, and
    has no use for `length`.

    Args:
        length: most tokens a sequence can have; the model's context length is always enough.
    """

    def __init__(self, length: int) -> None:
        check_whole("length", length)
        self.length = length
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, Any] = {}
        self._seen: dict[int, int] = {}

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
        if layer_idx not in self._slots:
            self._slots[layer_idx] = self._room(key_states), self._room(value_states)
            self._seen[layer_idx] = 0
        keys, values = self._slots[layer_idx]
        start = self._seen[layer_idx]
        end = start + key_states.shape[2]
        if end > self.length:
            raise ConfigError(f"a KeyValueCache of length={self.length} has no room for {end}")
        check_rows(keys.shape[0], key_states.shape[0])
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self._seen[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def recall(self, layer_idx: int) -> Any:
        """A slot's state, a tuple of tensors; None before it is first kept."""
        return self._states.get(layer_idx)

    def remember(self, state: Any, layer_idx: int, tokens: int) -> None:
        """Keep a slot's new state, after so many more tokens.

        Raises:
            ConfigError: gradients are wanted.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(state)):
            raise ConfigError("KeyValueCache keeps no gradients; decode under torch.no_grad()")
        self._states[layer_idx] = state
        self._seen[layer_idx] = self._seen.get(layer_idx, 0) + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens that a slot holds; 0 before it is written."""
        return self._seen.get(layer_idx, 0)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order; an index may occur more than once."""
        self._slots = {
            slot: (k.index_select(0, rows), v.index_select(0, rows))
            for slot, (k, v) in self._slots.items()
        }
        self._states = {slot: with_rows(state, rows) for slot, state in self._states.items()}

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`.

        Raises:
            ConfigError: the cache holds states, from which no token can be taken back.
        """
        if self._states and length < self.get_seq_length():
            raise ConfigError(
                f"crop({length}): states of {self.get_seq_length()} tokens cannot forget the last "
                "ones; use a new cache and read the first tokens again"
            )
        self._seen = {slot: min(seen, length) for slot, seen in self._seen.items()}

    @property
    def slots(self) -> list[tuple[Tensor, Tensor]]:
        """Each slot's keys and values (B, H_kv, length, D), filled up to `get_seq_length`."""
        return [self._slots[slot] for slot in sorted(self._slots)]

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken."""
        kept = (*self._slots.values(), *self._states.values())
        return sum(tensor.nbytes for slot in kept for tensor in tensors_of(slot))

    @property
    def states(self) -> list[Any]:
        """Each slot's state, where attention remembers one."""
        return [self._states[slot] for slot in sorted(self._states)]

    def _room(self, like: Tensor) -> Tensor:
        batch, heads, _, head_dim = like.shape
        return like.new_empty(batch, heads, self.length, head_dim)


def check_rows(held: int, given: int) -> None:
    """See that a batch is as large as the one a cache holds.

    Raises:
        ConfigError: it is not.
    """
    if held != given:
        raise ConfigError(
            f"the cache holds {held} sequences, not {given}; "
            "use a new cache for another batch, or select(rows)"
        )


def tensors_of(state: Any) -> Iterator[Tensor]:
    """What a slot's state consists of."""
    return (tensor for tensor in state if tensor is not None)


def with_rows(state: Any, rows: Tensor) -> Any:
    """A slot's state of these sequences of the batch, in this order."""
    chosen = (None if tensor is None else tensor.index_select(0, rows) for tensor in state)
    return type(state)(*chosen) if hasattr(state, "_fields") else tuple(chosen)
