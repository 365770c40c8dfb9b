"""`TrainingConfig`: how a model is trained. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyak.errors import ConfigError, unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Recipe of one run: the released groups, with rates scaled for small models.

    The optimizer is Muon for the matrices inside blocks and AdamW for everything else, as in
    arXiv:2605.24425. Rates rise linearly from 0 over the warm-up, then follow a cosine.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    steps: int = 1200
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences per step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None: the whole batch. The gradient is the same mean."""
    warmup: float = 0.1
    """Fraction of the steps over which rates rise from 0."""
    final_rate: float = 0.1
    """Rates end at this fraction of their peak."""
    muon_lr: float = 0.02
    """Peak rate of Muon, for the 2-D weights inside blocks."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon."""
    adam_lr: float = 3e-3
    """Peak rate of AdamW for embeddings, output and norms."""
    scalar_lr: float = 1e-2
    """Peak rate of AdamW for the rules' scalars."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay of embeddings and output; norms and scalars have none."""
    clip: float = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""
    eval_every: int | None = None
    """Steps between validations; None: a fifteenth of the steps."""
    eval_tokens: int = 32_768
    """Size of the one fixed validation set, in tokens."""
    seed: int = 0
    """Seeds the initial weights, dropout and the order of the data."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_tokens"):
            self._whole(name, 1)
        self._whole("seed", 0)
        for name in ("micro_batch_size", "eval_every"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"batch_size={self.batch_size}; choose a divisor"
            )
        for name in ("muon_lr", "adam_lr", "scalar_lr", "weight_decay"):
            self._number(name, 0, math.inf)
        for name in ("warmup", "final_rate"):
            self._number(name, 0, 1)
        if not (self._is_number(self.muon_momentum) and 0 <= self.muon_momentum < 1):
            raise ConfigError(f"muon_momentum={self.muon_momentum!r} must be from 0 to below 1")
        object.__setattr__(self, "adam_betas", tuple(self.adam_betas))
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas={self.adam_betas!r} must be two numbers in [0, 1)")
        if not (self._is_number(self.clip) and self.clip > 0):
            raise ConfigError(f"clip={self.clip!r} must be a number above 0")

    @staticmethod
    def _is_number(value: object) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not self._is_number(value) or not low <= value <= high:
            bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{name}={value!r} must be a number {bound}")

    @property
    def eval_interval(self) -> int:
        """Steps between validations."""
        return self.eval_every or max(1, self.steps // 15)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "adam_betas": list(self.adam_betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Back from `to_dict`.

        Raises:
            UnknownNameError: a key is not a field; the nearest is offered.
        """
        fields = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in fields:
                raise unknown("training setting", key, fields)
        return cls(**values)
