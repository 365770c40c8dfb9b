"""`ModelConfig`: everything that defines a model. Imports no torch, so it is cheap to build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from polyak.checks import check_whole
from polyak.errors import ConfigError, unknown
from polyak.nn.attention_registry import KINDS
from polyak.nn.backbone import MOST, check_backbone
from polyak.nn.controls import check_controls
from polyak.nn.presets import RULES, Preset, preset_fields
from polyak.settings import check_keys, typed

Splitting = Literal["lie_trotter", "simultaneous"]
Positions = Literal["learned", "rope", "sinusoidal", "none"]
PositionMix = Literal["added", "concatenated"]
NormKind = Literal["layer", "rms"]
NormPosition = Literal["pre", "post"]
MLPKind = Literal["plain", "gated"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
EmbeddingNorm = Literal["none", "layer", "rms"]
StreamStart = Literal["zeros", "x"]
_CHOICES = {
    "splitting": Splitting,
    "positions": Positions,
    "position_mix": PositionMix,
    "norm": NormKind,
    "norm_position": NormPosition,
    "mlp": MLPKind,
    "activation": Activation,
    "embedding_norm": EmbeddingNorm,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture of a Transformer whose layers are optimizer steps.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    rule: str = "gradient_descent"
    """Update rule: a registered name, or `path/to/file.py:Class`. Several, joined by `+`, each with
    its place: `residual_momentum@attention+gradient_descent@mlp`, `triple_momentum@1-6+nesterov`;
    options then stand in brackets behind a name, `heavy_ball[beta=0.9]@1-6.attention+…`."""
    num_layers: int = 4
    """Number of layers; each calls attention once and the MLP once."""
    num_heads: int = 4
    """Attention heads H; must divide d_model."""
    d_model: int = 128
    """Width d of attention and the MLP, and of the residual stream where `residual_width` leaves it
    so."""
    residual_width: int | None = None
    """Width R of the residual stream: of x, the rule's streams, norms, tables and the output
    matrix. Attention reads R numbers into heads of d/H, the MLP into its 4d, and both write R back:
    what is computed inside them stays as wide. A multiple of num_heads; None: d_model."""
    vocab_size: int = 256
    """Number of token ids."""
    context_length: int = 128
    """Longest sequence, in tokens. Where attention remembers a state of constant size, and
    positions are no learned table, only training's: sequences may be longer then."""
    splitting: Splitting = "lie_trotter"
    """`lie_trotter`: a step on attention, then one on the MLP. `simultaneous`: one step on their
    sum at the same point (the Euler splitting of arXiv:2601.23236)."""
    stream_start: StreamStart | None = None
    """Where streams start that otherwise start from their own embedding tables: `zeros`; or `x`,
    κ ∘ LN(x₀) of the first layer's x, with R learned numbers κ that start at 0.5 (LN is of the
    model's kind)."""
    tie_embeddings: bool = True
    """Use the token table as output matrix too."""
    embedding_norm: EmbeddingNorm = "none"
    """What x₀ becomes before the first layer, without parameters: (x₀ − mean)/√(var + eps) with
    `layer`, x₀/√(mean x₀² + eps) with `rms`. The sum of tokens and positions is normed; the table
    is not, and neither is an output matrix that is tied to it."""
    embedding_std: float | None = None
    """Standard deviation with which x's token table is drawn; the draws are the same, only scaled.
    None: 0.02, or 1 beside sinusoids with an untied output. A tied output matrix is that table, so
    logits start as many times larger. Tables of positions and streams stay at 0.02."""
    embedding_reinjection: bool = False
    """A control for a velocity's own tables: a second token (and position) table E, as large as a
    stream's, is added to x before every layer, x ← x + ω LN(E), with one learned number ω a layer,
    0.1 at first, and LN without parameters. No momentum carries it: each layer sees it anew."""
    causal: bool = True
    """Let a position see itself and earlier positions only."""
    positions: Positions = "learned"
    """`learned`: a table of one vector per position, added to tokens and to streams that start
    from an embedding. `rope`: queries and keys are turned by their position (rotary).
    `sinusoidal`: sines and cosines of the position come into x, and into no stream. `none`: only
    what attention itself makes of the order tells positions apart."""
    position_mix: PositionMix = "added"
    """How sinusoidal positions come into x: `added` to tokens of width d, or `concatenated` behind
    tokens of width d/2 (arXiv:2208.00579)."""
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
    norm_position: NormPosition = "pre"
    """`pre`: the oracles see LN(x). `post`: they see x, and x becomes LN(x) after each substep's
    step, streams staying as they are. The norms' weights and the final norm are the same."""
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
    activation_dropout: float = 0.0
    """Probability of dropping what is inside the MLP, behind its non-linearity, in training."""
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
            check_whole(name, getattr(self, name), most=MOST[name])
        check_whole("residual_width", self.residual_width, optional=True, most=MOST["d_model"])
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
        for name in ("tie_embeddings", "causal", "bias", "qk_norm", "embedding_reinjection"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        check_controls(self)
        check_backbone(self)
        if self.rope_scaling is not None:  # JSON has lists
            object.__setattr__(self, "rope_scaling", tuple(map(float, self.rope_scaling)))
        if not isinstance(self.norm_eps, int | float) or not 0 <= self.norm_eps < 1:
            raise ConfigError(f"norm_eps={self.norm_eps!r} must be a number from 0 to below 1")
        for name in ("dropout", "activation_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(f"{name}={value!r} must be a number from 0 to below 1")
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

    def _check_rule(self) -> None:
        from polyak.nn.placement import placement_of

        placed = placement_of(self)
        starts = [s for part in placed.parts for s in part.rule.streams if s.start == "embedding"]
        if self.stream_start is not None and not starts:
            raise ConfigError(
                f"stream_start={self.stream_start!r}: rule {placed.name} has no stream that starts "
                "from an embedding; leave stream_start out"
            )

    @property
    def head_width(self) -> int:
        """D of attention: d / H, or head_dim."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def stream_width(self) -> int:
        """R, width of x and of the rule's streams: residual_width, or d."""
        return self.d_model if self.residual_width is None else self.residual_width

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
    def token_width(self) -> int:
        """Width of a token's vector in the table of x: R, or R/2 beside sinusoidal positions."""
        return self.stream_width // (2 if self.position_mix == "concatenated" else 1)

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
        `momentum_transformer`: of arXiv:2208.00579, momentum attention, post-norm, sinusoidal
        positions beside the tokens, ReLU, biases, untied output; and its residual momentum, where
        no rule is given.

        Raises:
            UnknownNameError: there is no such preset; the nearest is offered.
            ConfigError: a field cannot work.
        """
        heads = fields.get("num_heads", cls().num_heads)
        rule = {"rule": RULES[name]} if name in RULES else {}
        return cls(**{**rule, **preset_fields(name, heads), **fields})

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
