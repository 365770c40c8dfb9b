"""`ModelConfig`: everything that defines a model. Imports no torch, so it is cheap to build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from polyak.errors import ConfigError, unknown
from polyak.settings import check_keys

Splitting = Literal["lie_trotter", "simultaneous"]
Activation = Literal["gelu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture of a Transformer whose layers are optimizer steps.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    rule: str = "gradient_descent"
    """Update rule: a registered name, or `path/to/file.py:Class`."""
    num_layers: int = 4
    """Number of layers; each calls attention once and the MLP once."""
    num_heads: int = 4
    """Attention heads H; must divide d_model."""
    d_model: int = 128
    """Width d of the residual stream."""
    vocab_size: int = 256
    """Number of token ids."""
    context_length: int = 128
    """Longest sequence, in tokens; there is one learned position per token."""
    splitting: Splitting = "lie_trotter"
    """`lie_trotter`: a step on attention, then one on the MLP. `simultaneous`: one step on their
    sum at the same point (the Euler splitting of arXiv:2601.23236)."""
    stream_start: Literal["zeros"] | None = None
    """`zeros` starts at zero the streams that otherwise start from their own embedding tables."""
    tie_embeddings: bool = True
    """Use the token table as output matrix too."""
    causal: bool = True
    """Let a position see itself and earlier positions only."""
    norm_eps: float = 1e-5
    """eps of every LayerNorm."""
    bias: bool = False
    """Biases in linear layers and LayerNorms."""
    activation: Activation = "gelu"
    """MLP non-linearity; `gelu` is the exact (erf) form."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and oracle outputs in training."""
    rule_options: dict[str, Any] = field(default_factory=dict, hash=False)
    """The rule's own options: initial values of its scalars, `frozen` (scalars not learned),
    `state_norm` or `update_norm` (`layer` or `none`)."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "d_model", "vocab_size", "context_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        if self.d_model % self.num_heads:
            divisors = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = min(divisors, key=lambda h: (abs(h - self.num_heads), h))
            raise ConfigError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                f"use {near} heads, or a width that is a multiple of {self.num_heads}"
            )
        for name, kinds in (("splitting", Splitting), ("activation", Activation)):
            if getattr(self, name) not in get_args(kinds):
                raise unknown(name, str(getattr(self, name)), get_args(kinds))
        for name in ("tie_embeddings", "causal", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        if not isinstance(self.norm_eps, int | float) or not 0 <= self.norm_eps < 1:
            raise ConfigError(f"norm_eps={self.norm_eps!r} must be a number from 0 to below 1")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} must be a number from 0 to below 1")
        if self.stream_start not in (None, "zeros"):
            raise ConfigError(f"stream_start={self.stream_start!r} must be 'zeros' or left out")
        if not isinstance(self.rule_options, Mapping):
            raise ConfigError(f"rule_options={self.rule_options!r} must map option names to values")
        object.__setattr__(self, "rule_options", dict(self.rule_options))
        if (self.rule, self.rule_options, self.stream_start) != ("gradient_descent", {}, None):
            self._check_rule()  # the default needs no look-up, which would import torch

    def _check_rule(self) -> None:
        from polyak import rules

        rule = rules.get(self.rule)
        rule.resolve(self.rule_options)
        starts = [stream.name for stream in rule.streams if stream.start == "embedding"]
        if self.stream_start is not None and not starts:
            raise ConfigError(
                f"stream_start={self.stream_start!r}: rule {rule.name} has no stream that starts "
                "from an embedding; leave stream_start out"
            )

    @property
    def head_dim(self) -> int:
        """D = d / H."""
        return self.d_model // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Back from `to_dict`.

        Raises:
            UnknownNameError: a key is not a field; the nearest is offered.
        """
        check_keys(cls, values, "model setting")
        return cls(**values)
