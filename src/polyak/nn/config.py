"""`ModelConfig`: everything that defines a model. Imports no torch, so it is cheap to build."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from polyak.checks import check_whole
from polyak.errors import ConfigError, unknown
from polyak.nn.attention_registry import KINDS
from polyak.nn.presets import Preset, preset_fields
from polyak.settings import check_keys, typed

Splitting = Literal["lie_trotter", "simultaneous"]
Positions = Literal["learned", "rope"]
NormKind = Literal["layer", "rms"]
MLPKind = Literal["plain", "gated"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
_CHOICES = {
    "splitting": Splitting,
    "positions": Positions,
    "norm": NormKind,
    "mlp": MLPKind,
    "activation": Activation,
}


# Far above any model: what a file names is looked at before it is listed or allocated.
_MOST = {
    "num_layers": 10_000,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "d_model": 2**20,
    "head_dim": 2**20,
    "mlp_width": 2**24,
    "vocab_size": 2**31 - 1,
    "context_length": 2**31 - 1,
}


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
    """Longest sequence, in tokens."""
    splitting: Splitting = "lie_trotter"
    """`lie_trotter`: a step on attention, then one on the MLP. `simultaneous`: one step on their
    sum at the same point (the Euler splitting of arXiv:2601.23236)."""
    stream_start: Literal["zeros"] | None = None
    """`zeros` starts at zero the streams that otherwise start from their own embedding tables."""
    tie_embeddings: bool = True
    """Use the token table as output matrix too."""
    causal: bool = True
    """Let a position see itself and earlier positions only."""
    positions: Positions = "learned"
    """`learned`: a table of one vector per position, added to tokens and to streams that start
    from an embedding. `rope`: queries and keys are turned by their position (rotary)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths; only with positions=rope."""
    rope_scaling: tuple[float, ...] | None = None
    """A stretch of the rotary wavelengths. Four numbers: Llama 3.1's, of long ones (`rope_type:
    llama3`): factor, low and high frequency factor, and the first context of the model. One number:
    of all by this factor (`linear`)."""
    norm: NormKind = "layer"
    """Kind of every norm, the rule's own included: LayerNorm, or RMSNorm (`rms`: no mean is
    taken off, and there is no bias)."""
    norm_eps: float = 1e-5
    """eps of every norm."""
    bias: bool = False
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; None: as `bias`."""
    num_kv_heads: int | None = None
    """Heads of keys and values, shared by groups of query heads (grouped-query attention); must
    divide num_heads. None: as many as num_heads."""
    head_dim: int | None = None
    """Width of an attention head, where it is not d/H (as in Qwen 3); queries then have H·head_dim
    numbers. Matrix rules see a token as (H, d/H) all the same."""
    qk_norm: bool = False
    """Norms of each head's queries and keys, before they are turned by position."""
    mlp: MLPKind = "plain"
    """`plain`: down(act(up x)). `gated`: down(act(gate x) · up x), SwiGLU with activation=silu."""
    mlp_width: int | None = None
    """Width inside the MLP. None: 4d; gated 8d/3 up to a multiple of 8, which is as many
    parameters."""
    activation: Activation = "gelu"
    """MLP non-linearity: `gelu` (the exact, erf form), `gelu_tanh` (its approximation in GPT-2),
    `silu` or `relu`."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention weights and oracle outputs in training. Only
    softmax attention has weights to drop."""
    rule_options: dict[str, Any] = field(default_factory=dict, hash=False)
    """The rule's own options: initial values of its scalars, `frozen` (scalars not learned),
    `state_norm` or `update_norm` (`layer` or `none`)."""
    attention: str = "softmax"
    """Kind of attention: a registered name (`softmax`, `linear`, `momentum`,
    `adaptive_momentum`), or `path/to/file.py:Class`."""
    attention_options: dict[str, Any] = field(default_factory=dict, hash=False)
    """The kind's own options; see docs/momentum-transformer.md."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "d_model", "vocab_size", "context_length"):
            check_whole(name, getattr(self, name), most=_MOST[name])
        if self.d_model % self.num_heads:
            divisors = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = min(divisors, key=lambda h: (abs(h - self.num_heads), h))
            raise ConfigError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; "
                f"use {near} heads, or a width that is a multiple of {self.num_heads}"
            )
        for name, kinds in _CHOICES.items():
            if getattr(self, name) not in get_args(kinds):
                raise unknown(name, str(getattr(self, name)), get_args(kinds))
        for name in ("tie_embeddings", "causal", "bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        self._check_backbone()
        if not isinstance(self.norm_eps, int | float) or not 0 <= self.norm_eps < 1:
            raise ConfigError(f"norm_eps={self.norm_eps!r} must be a number from 0 to below 1")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} must be a number from 0 to below 1")
        if self.stream_start not in (None, "zeros"):
            raise ConfigError(f"stream_start={self.stream_start!r} must be 'zeros' or left out")
        for name in ("rule_options", "attention_options"):
            options = getattr(self, name)
            if not isinstance(options, Mapping):
                raise ConfigError(f"{name}={options!r} must map option names to values")
            object.__setattr__(self, name, dict(options))
        if (self.rule, self.rule_options, self.stream_start) != ("gradient_descent", {}, None):
            self._check_rule()  # the default needs no look-up, which would import torch
        if (self.attention, self.attention_options) != ("softmax", {}):
            kind = KINDS.get(self.attention)
            kind.resolve(self.attention_options, causal=self.causal)

    def _check_backbone(self) -> None:
        for name in ("num_kv_heads", "head_dim", "mlp_width"):
            check_whole(name, getattr(self, name), optional=True, most=_MOST[name])
        if self.num_heads % self.kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        if self.qkv_bias is not None and not isinstance(self.qkv_bias, bool):
            raise ConfigError(f"qkv_bias={self.qkv_bias!r} must be true, false or none")
        theta = self.rope_theta
        number = isinstance(theta, int | float) and not isinstance(theta, bool)
        if not number or not 0 < theta < math.inf:
            raise ConfigError(f"rope_theta={theta!r} must be a number above 0")
        if self.positions == "rope" and self.head_width % 2:
            raise ConfigError(
                f"positions='rope' turns pairs of dimensions, but head_dim={self.head_dim} is odd; "
                "use an even one"
                if self.head_dim is not None
                else f"positions='rope' turns pairs of dimensions, but d_model/num_heads = "
                f"{self.head_width} is odd; use a d_model that is a multiple of "
                f"{2 * self.num_heads}"
            )
        if self.rope_scaling is not None:
            self._check_scaling(self.rope_scaling)
        if self.positions == "learned" and theta != 10000.0:
            raise ConfigError(
                f"rope_theta={theta!r} needs positions='rope', and positions are 'learned'; "
                "set positions, or leave rope_theta out"
            )

    def _check_scaling(self, scaling: Any) -> None:
        if self.positions != "rope":
            raise ConfigError(
                f"rope_scaling={scaling!r} needs positions='rope'; set them, or leave it out"
            )
        values = tuple(scaling) if isinstance(scaling, list | tuple) else ()
        numbers = all(isinstance(v, int | float) and 0 < v < math.inf for v in values)
        rising = len(values) == 4 and numbers and values[1] < values[2]
        if not (rising or (len(values) == 1 and numbers)):
            raise ConfigError(
                f"rope_scaling={scaling!r} must be four numbers above 0: factor, low and high "
                "frequency factor (low below high), first context, such as 8+1+4+8192; or one "
                "factor for all wavelengths, such as (4,)"
            )
        object.__setattr__(self, "rope_scaling", tuple(map(float, values)))  # JSON has lists

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
    def head_width(self) -> int:
        """D of attention: d / H, or head_dim."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """H_kv, heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def qkv_width(self) -> int:
        """(H + 2 H_kv)·D, what attention computes of a token: queries, keys and values."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_width

    @property
    def heads_width(self) -> int:
        """H·D, what the heads give to attention's output matrix."""
        return self.num_heads * self.head_width

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.d_model if self.mlp == "plain" else -(-self.d_model // 3) * 8

    @classmethod
    def preset(cls, name: Preset, **fields: Any) -> ModelConfig:
        """A backbone by name; fields given win over the preset's.

        `paper`: the released models, and the defaults. `gpt2`: OpenAI's. `llama`: rotary
        positions, RMSNorm, SwiGLU, grouped-query attention, no biases, untied output.

        Raises:
            UnknownNameError: there is no such preset; the nearest is offered.
            ConfigError: a field cannot work.
        """
        heads = fields.get("num_heads", cls().num_heads)
        return cls(**{**preset_fields(name, heads), **fields})

    def preset_fields(self, name: str, num_heads: int | None = None) -> dict[str, Any]:
        """What a preset sets in this model, or in one of `num_heads`; see `settings`."""
        return preset_fields(name, self.num_heads if num_heads is None else num_heads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Back from `to_dict`.

        Raises:
            UnknownNameError: a key is not a field; the nearest is offered.
            ConfigError: a value is of another type, or out of range.
        """
        check_keys(cls, values, "model setting")
        return cls(**typed(cls, values))
