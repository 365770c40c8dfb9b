r"""What a kind of attention declares in its class body: its options, each with what it may be.

An option is read as an attribute, `self.eps`. A coefficient may be learned, one for the model, for
each layer or for each head; it is then stored unconstrained ("raw") and mapped onto its domain, as
the scalars of rules are: σ(raw) onto (0, 1), softplus(raw) onto (0, ∞).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from polyak.errors import ConfigError, shown_value, unknown

if TYPE_CHECKING:
    from torch import Tensor

Needs: TypeAlias = Mapping[str, tuple[Any, ...]]

LEARNED = ("none", "model", "layer", "head")
"""How a coefficient can be learned: not at all, or one for each of these."""


@dataclass(frozen=True)
class Option:
    """An option of a kind of attention.

    Attributes:
        default: its value where the user sets none.
        domain: what it may be, for messages and tables.
        fits: whether a value is of that domain.
        about: what it does, in a line for tables.
        causal: the option exists only in models with this `causal`; None: in all.
        needs: other options, each with the values at which this one has an effect.
    """

    default: Any
    domain: str
    fits: Callable[[Any], bool]
    about: str
    causal: bool | None = None
    needs: Needs = field(default_factory=dict)
    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __get__(self, kind: Any, owner: type | None = None) -> Any:
        return self if kind is None else kind.options[self.name]


@dataclass(frozen=True)
class Choice(Option):
    """An option that takes one of a few values."""

    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coefficient(Option):
    """A positive number, or one of the unit interval, that may be learned (option `NAME_learned`).

    Read by `Attention.coefficient`, as one that a model's layers share is not the layer's own.
    """

    below_one: bool = False

    def raw(self, value: float) -> float:
        """The raw parameter behind a value.

        Raises:
            ConfigError: the value is on the edge of the domain, which no raw parameter reaches.
        """
        if not self.below_one:
            return value + math.log(-math.expm1(-value))  # ln(e^value − 1) without overflow
        if value == 0:
            raise ConfigError(
                f"attention option {self.name}=0 with {self.name}_learned: a learned {self.name} "
                "starts above 0, as the sigmoid of its parameter; use 0.1"
            )
        return math.log(value / (1 - value))

    def constrain(self, raw: Tensor) -> Tensor:
        """The value of a raw parameter, in float64, in which a sigmoid is 1 far later."""
        import torch.nn.functional as F

        exact = raw.double()
        return exact.sigmoid() if self.below_one else F.softplus(exact)


def choice(
    default: str,
    *others: str,
    about: str,
    causal: bool | None = None,
    needs: Needs | None = None,
) -> Any:
    """One of a few names."""
    values = (default, *others)
    return Choice(
        default=default,
        domain=", ".join(values),
        fits=lambda value: value in values,
        about=about,
        causal=causal,
        needs=needs or {},
        values=values,
    )


def flag(default: bool, *, about: str, needs: Needs | None = None) -> Any:
    """true or false."""
    return Option(
        default, "true or false", lambda value: isinstance(value, bool), about, None, needs or {}
    )


def whole(default: int, *, about: str, needs: Needs | None = None) -> Any:
    """A whole number of at least 1."""

    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31

    return Option(default, "a whole number of at least 1", fits, about, None, needs or {})


def number(default: float, *, about: str, needs: Needs | None = None) -> Any:
    """A number of at least 0."""

    def fits(value: Any) -> bool:
        return _is_number(value) and value >= 0

    return Option(default, "a number of at least 0", fits, about, None, needs or {})


def unit(default: float, *, about: str) -> Any:
    """A coefficient in [0, 1); learned, in (0, 1)."""

    def fits(value: Any) -> bool:
        return _is_number(value) and 0 <= value < 1

    return Coefficient(default, "a number in [0, 1)", fits, about, below_one=True)


def positive(default: float, *, about: str) -> Any:
    """A coefficient above 0."""

    def fits(value: Any) -> bool:
        return _is_number(value) and value > 0

    return Coefficient(default, "a number above 0", fits, about)


def learned_option(coefficient: Coefficient) -> Option:
    """The option that says whether a coefficient is learned."""
    found: Option = choice(
        *LEARNED,
        about=f"learn {coefficient.name}, starting from its value: one for the model, for each "
        "layer, or for each head of keys and values",
    )
    object.__setattr__(found, "name", f"{coefficient.name}_learned")
    return found


def resolve(
    kind: str, options: Mapping[str, Option], given: Mapping[str, Any], causal: bool
) -> dict[str, Any]:
    """Every option of a kind with its value: the user's, or the default.

    Raises:
        UnknownNameError: an option that the kind does not have; the nearest is offered.
        ConfigError: a value out of its domain, or an option that would have no effect.
    """
    here = {name: option for name, option in options.items() if option.causal in (None, causal)}
    for name, value in given.items():
        what = f"attention option {name}={shown_value(value)}"
        if name not in options:
            if not options:
                raise ConfigError(f"{what}: attention {kind} has no options; leave it out")
            raise unknown(f"option of attention {kind}", str(name), options)
        option = options[name]
        if name not in here:
            raise ConfigError(
                f"{what} needs causal={str(option.causal).lower()}, and this model has "
                f"causal={str(causal).lower()}; leave it out"
            )
        if isinstance(option, Choice) and isinstance(value, str) and not option.fits(value):
            raise unknown(f"{name} of attention {kind}", value, option.values)
        if not option.fits(value):
            raise ConfigError(f"{what} of {kind} must be {option.domain}")
    found = {name: given.get(name, option.default) for name, option in here.items()}
    for name in given:
        for other, values in options[name].needs.items():
            if other in found and found[other] not in values:
                raise ConfigError(
                    f"attention option {name}={shown_value(given[name])} has no effect with "
                    f"{other}={shown_value(found[other])}; leave one of them out"
                )
    for name, option in here.items():
        if isinstance(option, Coefficient) and found.get(f"{name}_learned", "none") != "none":
            option.raw(float(found[name]))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308
