"""Next-token logits for rows of tokens that grow one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.errors import ConfigError
from polyak.nn.cache import KeyValueCache
from polyak.nn.decoding.one_token import OneToken
from polyak.nn.transformer import Transformer


class Decoder:
    """Rows of tokens, read once: after that, each new token costs one token's work.

    Rows of different lengths are padded on the left, where nothing attends to.

    A model with learned positions cannot look beyond its context, and one that keeps keys and
    values would need ever more memory. A row that fills the context then goes on from its last
    `context_length // 2` tokens, which are read again from position 0, so that over time a token
    is predicted from the last T/2 to T tokens at about twice the work. A single step back at a
    time would cost a pass over the whole context for every token. A model without an end
    (`Transformer.longest`) reads all of a row once, and takes the same memory for ever.

    Args:
        model: in evaluation mode.
        rows: each row's tokens, at least one; only the last `context_length` are read of a
            model that has an end.

    Raises:
        ConfigError: a row is empty, or a token is not one of the model's.
    """

    def __init__(self, model: Transformer, rows: Sequence[Sequence[int]]) -> None:
        config = model.config
        for number, row in enumerate(rows, 1):
            if not len(row):
                raise ConfigError(
                    f"prompt {number} has no tokens; begin with the end-of-text token"
                )
            low, high = min(row), max(row)
            if low < 0 or high >= config.vocab_size:
                raise ConfigError(
                    f"prompt {number} has the token {low if low < 0 else high}; the model knows "
                    f"0 to {config.vocab_size - 1}"
                )
        if not config.causal:
            raise ConfigError("a model with causal=False cannot continue a text")
        self.model, self.context = model, config.context_length
        self.device = next(model.parameters()).device
        self.endless = model.longest is None
        self.rows = [list(row if self.endless else row[-self.context :]) for row in rows]
        self.rereads = [0] * len(rows)
        self._cache: KeyValueCache | None = None
        self._padding: Tensor | None = None
        self._width = 0
        self._one: OneToken | None = None  # once a row is alone and without padding

    def logits(self, tokens: Tensor | None = None) -> Tensor:
        """Logits (rows, V) for the token after each row.

        Args:
            tokens: (rows,), appended to the rows first; None the first time.
        """
        if tokens is None:
            return self._read()
        numbers = tokens.tolist()
        for row, token in zip(self.rows, numbers, strict=True):
            row.append(token)
        if self._width == self.context and not self.endless:
            half = max(1, self.context // 2)
            for place, row in enumerate(self.rows):
                if len(row) > self.context:
                    self.rows[place] = row[-half:]
                    self.rereads[place] += 1
            return self._read()
        self._width += 1
        if self._one is None and self._alone:
            assert self._cache is not None
            self._one, self._cache = OneToken(self.model, self._cache), None
        return self._forward(tokens[:, None]) if self._one is None else self._one.logits(tokens)

    @property
    def _alone(self) -> bool:
        alone = len(self.rows) == 1 and self._padding is None
        return alone and not self.model.training and OneToken.supports(self.model)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        kept = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.rows = [self.rows[row] for row in rows]
        self.rereads = [self.rereads[row] for row in rows]
        if self._cache is not None:
            self._cache.select(kept)
        if self._padding is not None:
            self._padding = self._padding[kept]

    def _read(self) -> Tensor:
        """Read all rows from their beginning into a new cache."""
        lengths = [len(row) for row in self.rows]
        self._width = width = max(lengths)
        self._one = None
        self._cache = KeyValueCache(self.context)
        ids = torch.tensor(
            [[0] * (width - len(row)) + row for row in self.rows], device=self.device
        )
        padding = torch.tensor([width - length for length in lengths], device=self.device)
        self._padding = padding if width > min(lengths) else None
        return self._forward(ids)

    def _forward(self, ids: Tensor) -> Tensor:
        mask = positions = None
        if self._padding is not None:
            first = self._width - ids.shape[1]
            places = torch.arange(first, self._width, device=self.device)
            positions = (places - self._padding[:, None]).clamp_(min=0)
            if not (self.endless and first):  # a state holds no padding to look away from
                places = torch.arange(self._width, device=self.device)
                mask = places >= self._padding[:, None]
        features = self.model.features(
            ids, attention_mask=mask, position_ids=positions, cache=self._cache
        )
        logits: Tensor = self.model.head(features[:, -1])
        return logits
