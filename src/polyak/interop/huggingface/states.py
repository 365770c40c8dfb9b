"""`StateCache`: what attention with a state of constant size remembers, as a cache of transformers.

Names and layout are those of flash-linear-attention: an entry of a call of attention is a
dictionary with its `recurrent_state`, a tuple of tensors whose first dimensions are (batch, kv
heads), in float32 or better: `polyak.ops.AttentionState` (S, P, Z and, of adaptive momentum, the
last key and value). `update(recurrent_state=…, layer_idx=…, offset=tokens)` replaces it.
"""

# mypy: disable-error-code="override,no-untyped-call,misc,unused-ignore"
# (signatures of transformers differ between its versions, and some have no types)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from polyak.errors import ConfigError
from polyak.nn.cache import tensors_of, with_rows


class _StateLayer(CacheLayerMixin):
    """The state of one call of attention, and of how many tokens it is."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing: a state is as large as it is."""

    def update(self, *_: Any, **__: Any) -> Any:
        """Refused: it is for keys and values."""
        raise ConfigError(
            "past_key_values: a StateCache remembers states, and this model's attention keeps keys "
            "and values; leave past_key_values out"
        )

    def get_seq_length(self, *_: Any) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: Any, *_: Any) -> tuple[int, int]:
        """Keys that a mask speaks of: all tokens seen and the new ones, and where they begin."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + new, 0

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # transformers 4

    def offload(self) -> None:
        """Nothing: a state is small."""

    prefetch = offload

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the states of other rows, in this order: beams."""
        if self.state is not None:
            device = next(iter(tensors_of(self.state))).device
            self.state = with_rows(self.state, beam_idx.to(device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every row's state so many times."""
        if self.state is not None:
            rows = torch.arange(next(iter(tensors_of(self.state))).shape[0])
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, *_: Any) -> None:
        """Refused: no token can be taken out of a state."""
        raise ConfigError(
            f"crop: states of {self.seen} tokens cannot forget the last ones, so drafts of an "
            "assistant cannot be taken back; generate without one"
        )


class StateCache(Cache):
    """States of every call of attention; what `generate` and a forward pass go on from."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_StateLayer)

    layers: list[Any]

    def recall(self, layer_idx: int) -> Any:
        """See `polyak.nn.cache.StateCache`."""
        return self.layers[layer_idx].state if layer_idx < len(self.layers) else None

    def remember(self, state: Any, layer_idx: int, tokens: int) -> None:
        """See `polyak.nn.cache.StateCache`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_StateLayer())
        layer = self.layers[layer_idx]
        layer.state, layer.seen = state, layer.seen + tokens

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As flash-linear-attention's caches: a new `recurrent_state` after `offset` more tokens.

        Returns:
            The entry.

        Raises:
            ConfigError: keys and values are given, which this cache does not keep.
        """
        state, layer_idx = kwargs.get("recurrent_state"), int(kwargs.get("layer_idx", 0))
        if args or state is None:
            _StateLayer().update()
        self.remember(state, layer_idx, int(kwargs.get("offset", 1)))
        return self[layer_idx]

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        """A call's entry, as in flash-linear-attention."""
        others = dict.fromkeys(("attn_state", "conv_state", "ffn_state"))
        return {"recurrent_state": self.layers[layer_idx].state, **others}
