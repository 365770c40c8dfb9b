r"""What a rule declares in its class body: learned scalars, norms and choices.

A learned scalar is stored unconstrained ("raw") and read through a smooth map onto its
domain, as in the released code:

- `unit_interval`: σ(raw) = 1/(1 + e^{−raw}), in (0, 1);
- `positive`: softplus(raw) = ln(1 + e^{raw}), in (0, ∞);
- `angle`: (π/2)·σ(raw), in (0, π/2);
- `unconstrained`: raw itself.

Reading `self.beta` in `step` gives the constrained value as a tensor of one element; with
`shape="d_model"`, `"heads"` or `"head_dim"` one of d, H or D = d/H elements, a coefficient for each
channel, head or dimension of a head, all of which start at the one initial value.

With the rule option `coefficients="unconstrained"` every scalar of a rule is its raw value. A
sigmoid reaches 0 only where its slope has vanished too; unconstrained, β = 0 is an ordinary
point with slope 1, so that a rule can start exactly at its reduction and still learn to leave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.errors import ConfigError, RuleError

SHAPES = ("d_model", "heads", "head_dim")
Shape: TypeAlias = tuple[int, ...] | str


def _finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond a float's range
        return False


@dataclass(frozen=True)
class Scalar:
    """A learned scalar: its initial value, domain and the map from the raw parameter.

    Attributes:
        initial: value at initialisation, after the map.
        domain: the values it can take, for messages and tables.
        constrain: raw tensor → value tensor.
        raw_of: initial value → raw value; None outside the domain.
        shape: of the raw parameter; (1,) in every released rule but AdamW's λ, which is ().
            A name for a vector: `"d_model"`, `"heads"` or `"head_dim"`.
        requires: name of the norm without which the scalar does not exist.
    """

    initial: float
    domain: str
    constrain: Callable[[Tensor], Tensor]
    raw_of: Callable[[float], float | None]
    shape: Shape = (1,)
    requires: str | None = None
    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __get__(self, rule: Any, owner: type | None = None) -> Any:
        if rule is None:
            return self
        ready = rule.__dict__.get(self.name)  # see polyak.nn.decoding.one_token
        if ready is not None:
            return ready
        raw = getattr(rule, f"{self.name}_raw")
        return raw if rule.options["coefficients"] == "unconstrained" else self.constrain(raw)

    def __set__(self, rule: Any, value: object) -> None:
        raise AttributeError(f"set {self.name}_raw, the raw parameter behind {self.name!r}")

    def freed(self) -> Scalar:
        """The same scalar without its map: the raw value itself."""
        return replace(self, domain=_LINE, constrain=_same, raw_of=_same)

    def starting_at(self, value: object) -> Scalar:
        """The same scalar with another initial value.

        Raises:
            ConfigError: the value is not a number in the domain.
        """
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not _finite(value) or self.raw_of(float(value)) is None:  # type: ignore[arg-type]
            raise ConfigError(
                f"rule option {self.name}={value!r}: its initial value must be a number in "
                f"{self.domain}"
            )
        return replace(self, initial=float(value))  # type: ignore[arg-type]

    @property
    def is_vector(self) -> bool:
        """Whether there is one for each channel, head or dimension of a head."""
        return isinstance(self.shape, str)

    def parameter(self, d_model: int, num_heads: int) -> nn.Parameter:
        """A fresh raw parameter whose constrained value is `initial`."""
        raw = self.raw_of(self.initial)
        assert raw is not None, f"{self.name}: initial value {self.initial} outside {self.domain}"
        sizes = {"d_model": d_model, "heads": num_heads, "head_dim": d_model // num_heads}
        shape = (sizes[self.shape],) if isinstance(self.shape, str) else self.shape
        return nn.Parameter(torch.full(shape, raw))

    def __post_init__(self) -> None:
        if isinstance(self.shape, str) and self.shape not in SHAPES:
            raise RuleError(f"shape={self.shape!r} must be one of {', '.join(SHAPES)}")


def unit_interval(
    initial: float | None = None, *, raw: float | None = None, shape: Shape = (1,)
) -> Any:
    """A scalar in (0, 1), the sigmoid of its raw parameter; start it by value or by `raw`."""
    if initial is None:
        initial = 1 / (1 + math.exp(-(raw if raw is not None else 0.0)))
    return Scalar(initial, "(0, 1)", torch.sigmoid, _logit, shape)


def positive(initial: float, *, shape: Shape = (1,), requires: str | None = None) -> Any:
    """A scalar above 0, the softplus of its raw parameter."""
    return Scalar(initial, "(0, ∞)", F.softplus, _softplus_inverse, shape, requires)


def angle(initial: float, *, shape: Shape = (1,)) -> Any:
    """A scalar in (0, π/2), π/2 times the sigmoid of its raw parameter."""
    return Scalar(initial, "(0, π/2)", _turned, _turned_inverse, shape)


def unconstrained(initial: float, *, shape: Shape = (1,)) -> Any:
    """A scalar that can take any value: the raw parameter itself."""
    return Scalar(initial, _LINE, _same, _same, shape)


_LINE = "(−∞, ∞)"
Value = TypeVar("Value")


def _same(value: Value) -> Value:
    return value


def _logit(value: float) -> float | None:
    return math.log(value / (1 - value)) if 0 < value < 1 else None


def _turned(raw: Tensor) -> Tensor:
    return math.pi / 2 * torch.sigmoid(raw)


def _turned_inverse(value: float) -> float | None:
    return _logit(2 * value / math.pi)


def _softplus_inverse(value: float) -> float | None:
    if value <= 0:
        return None
    return value + math.log(-math.expm1(-value))  # ln(e^value − 1) without overflow


@dataclass(frozen=True)
class Norm:
    """A norm that a rule applies to a state or an update, and can be told to leave out.

    Attributes:
        option: the rule option that controls it: `"layer"`, a norm of the model's kind
            (`ModelConfig.norm`), or `"none"`.
        default: the option's value when the user sets none.
    """

    option: str
    default: str = "layer"

    VALUES = ("layer", "none")


def state_norm(default: str = "layer") -> Any:
    """LN_v: normalises a stream as it is updated. Rule option `state_norm`: `layer` or `none`."""
    return Norm("state_norm", default)


def update_norm(default: str = "layer") -> Any:
    """LN_u: normalises the update of x. Rule option `update_norm`: `layer` or `none`."""
    return Norm("update_norm", default)


@dataclass(frozen=True)
class Choice:
    """An option of a rule that takes one of a few values."""

    values: tuple[Any, ...]
    default: Any = field(default=None)
    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __get__(self, rule: Any, owner: type | None = None) -> Any:
        return self if rule is None else rule.options[self.name]


def choice(default: Any, *others: Any) -> Any:
    """An option with a default and other allowed values; `self.NAME` reads the chosen one."""
    return Choice((default, *others), default)


def descends_at(**options: Any) -> Mapping[str, Any]:
    """The rule options at which a step is exactly x ← x + O(x), whatever the state holds.

    Scalars among them may lie on the edge of their domain (β = 0): with
    `coefficients="unconstrained"` a model can start there.
    """
    return MappingProxyType(options)
