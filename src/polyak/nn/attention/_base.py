r"""`Attention`: projections, norms and positions around what a kind of attention computes.

O(x) = attention(LN x), (B, T, d) → (B, T, d); an update rule adds it to the residual stream in
its own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.errors import AttentionError, ConfigError
from polyak.nn.attention._options import Coefficient, Option, learned_option, resolve
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context, places
from polyak.nn.norms import head_norm, norm
from polyak.nn.rotary import rotary_table, rotate


class Attention(nn.Module):
    r"""Multi-head attention of LN(x), with fused query, key and value projections.

    In a post-norm model it sees x itself, and `norm` is applied after the step.

    What is common to all kinds; a kind defines `attend`. H query heads share H_kv heads of keys
    and values, H/H_kv neighbours each; with rotary positions, queries and keys are turned, after
    their own norms where there are any. Weights qkv ((H + 2H_kv)·D, d), queries first, then keys,
    then values; and out (d, H·D), with d the width of the residual stream.

    Class attributes a kind may set:
        equation: one line for tables.
        paper: where it is from.
        recurrent: decoding remembers a state of constant size (`Context.recall`), not keys and
            values, so a sequence may be longer than the context where positions allow it.
        causal_only: there is no form of it in which a token sees later ones.
        declared: the options, collected from the class body (made by `choice`, `flag`, `number`,
            `positive`, `unit` or `whole` of `polyak.nn.attention`), not set by hand.
    """

    name: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    recurrent: ClassVar[bool] = False
    causal_only: ClassVar[bool] = False
    declared: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Option)}
        learned = (learned_option(o) for o in own.values() if isinstance(o, Coefficient))
        cls.declared = {**cls.declared, **own, **{option.name: option for option in learned}}
        cls.name = vars(cls).get("name") or cls.__name__
        for price in ("flops", "decoding_flops"):  # a subclass may compute something else
            if price not in vars(cls):
                setattr(cls, price, vars(Attention)[price])

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, bias = config.stream_width, config.bias if config.qkv_bias is None else config.qkv_bias
        self.num_heads, self.causal, self.dropout = config.num_heads, config.causal, config.dropout
        self.num_kv_heads, self.head_dim = config.kv_heads, config.head_width
        self.pre_norm = config.norm_position == "pre"
        self.rope_theta = config.rope_theta if config.positions == "rope" else None
        self.rope_scaling = config.rope_scaling
        self.options = self.resolve(config.attention_options, causal=config.causal)
        self.norm = norm(config)
        self.qkv = nn.Linear(d, config.qkv_width, bias=bias)
        self.q_norm = head_norm(config) if config.qk_norm else None
        self.k_norm = head_norm(config) if config.qk_norm else None
        self.out = nn.Linear(config.heads_width, d, bias=config.bias)
        for name, shape in (("layer", 1), ("head", self.num_kv_heads)):
            for raw_name, raw in self.raw_coefficients(self.options, name).items():
                self.register_parameter(raw_name, nn.Parameter(torch.full((shape,), raw)))

    @classmethod
    def resolve(cls, options: Mapping[str, Any], *, causal: bool) -> dict[str, Any]:
        """Every option of the kind with its value: the user's, or the default.

        Args:
            options: the user's `attention_options`.
            causal: of the model.

        Raises:
            UnknownNameError: an option the kind does not have; the nearest is offered.
            ConfigError: a value out of range, options that do not go together, or a model that is
                not causal for a kind that is.
        """
        if cls.causal_only and not causal:
            raise ConfigError(
                f"attention={cls.name!r} is causal, and this model has causal=false; use "
                "causal=true, or another kind"
            )
        return resolve(cls.name, cls.declared, options, causal)

    @classmethod
    def raw_coefficients(cls, options: Mapping[str, Any], of: str) -> dict[str, float]:
        """Raw start by parameter name of the coefficients learned for each `of` (of `LEARNED`)."""
        return {
            f"{name}_raw": option.raw(float(options[name]))
            for name, option in cls.declared.items()
            if isinstance(option, Coefficient) and options[f"{name}_learned"] == of
        }

    @classmethod
    def flops(cls, config: ModelConfig, tokens: int) -> tuple[int, int] | None:
        """Matrix products of `attend` on a sequence of so many tokens, forward and backward.

        None, where a kind does not say, is measured. Not inherited.
        """
        return None

    @classmethod
    def decoding_flops(cls, config: ModelConfig, tokens: int) -> int | None:
        """Matrix products of `attend` on one more token, the last of so many; None: measured."""
        return None

    @property
    def sees_length(self) -> bool:
        """Whether what a token reads depends on how many tokens follow, though not on which."""
        return False

    def coefficient(self, name: str, context: Context | None = None) -> Any:
        """A coefficient's value: a number, or where it is learned a tensor (), (1,) or (H_kv,)."""
        option = self.declared[name]
        assert isinstance(option, Coefficient)
        of = self.options[f"{name}_learned"]
        if of == "none":
            return self.options[name]
        if of != "model":
            return option.constrain(getattr(self, f"{name}_raw"))
        if context is None or context.shared is None:
            raise AttentionError(
                f"{name} is the model's: pass Transformer.context(...) to its blocks"
            )
        return option.constrain(context.shared[f"{name}_raw"])

    @torch.no_grad()
    def scalar_values(self, shared: Mapping[str, Tensor]) -> dict[str, float]:
        """The learned coefficients' current values, by name.

        Of one for each head, its mean, and under `NAME.std` its standard deviation over heads.
        """
        values: dict[str, float] = {}
        for name, option in self.declared.items():
            if not isinstance(option, Coefficient) or self.options[f"{name}_learned"] == "none":
                continue
            value = self.coefficient(name, Context(shared=shared))
            values[name] = float(value.mean())
            if self.options[f"{name}_learned"] == "head":
                values[f"{name}.std"] = float(value.std(correction=0))
        return values

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, T, d) → (B, T, d); with a context, padding is not seen and cached keys are."""
        dropout = self.dropout if self.training else 0.0
        heads = self.qkv(self.norm(x) if self.pre_norm else x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            table = self._table(x, context)
            q, k = rotate(q, table), rotate(k, table)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        y = self.attend(q, k, v, context, dropout)
        return F.dropout(self.out(y.transpose(1, 2).flatten(-2)), dropout)

    def _table(self, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these tokens' positions, the same in every layer of a pass."""
        assert self.rope_theta is not None
        if context is not None and context.rotary is not None:
            return context.rotary
        positions = places(x.shape[1], x.device, context)
        table = rotary_table(positions, self.head_dim, self.rope_theta, x.dtype, self.rope_scaling)
        if context is not None:
            context.rotary = table
        return table

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context | None, dropout: float
    ) -> Tensor:
        """What each query reads.

        Args:
            q: queries (B, H, T, D).
            k: keys (B, H_kv, T, D).
            v: values (B, H_kv, T, D).
            context: padding and what is cached; None for whole sequences.
            dropout: probability of dropping attention weights, for kinds that have such weights.

        Returns:
            (B, H, T, D).
        """
        raise AttentionError(f"{type(self).__name__} defines no attend(self, q, k, v, ...)")
