r"""`UpdateRule`: how a Transformer's residual stream moves, given what an oracle says.

A rule sees the residual stream x (B, T, d), its own state (auxiliary streams carried through
depth) and an oracle O with O(y) = attention(LN y) or mlp(LN y), the negative gradient of a
token energy at y. One call of `step` is one optimizer step along depth:

    (x, state) ← step(x, state, O)

State is passed in and returned, never kept on the module, so that compilation, activation
checkpointing, `torch.func` transforms and caching see all of it.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from polyak.errors import ConfigError, RuleError, unknown
from polyak.rules._declarations import Choice, Norm, Scalar
from polyak.rules._norms import NoNorm, norm_of

if TYPE_CHECKING:
    from polyak.rules._work import Work

Oracle: TypeAlias = Callable[[Tensor], Tensor]
State: TypeAlias = Any
"""A rule's auxiliary streams: a named tuple with a `replace` method."""

COEFFICIENTS = ("constrained", "unconstrained")
STARTS = ("embedding", "x", "zeros", "ones", "identity")


@dataclass(frozen=True)
class Stream:
    """An auxiliary stream that a rule carries through depth beside x, one value per token.

    Attributes:
        name: attribute of the state, `state.v`.
        start: its value before the first layer: `"embedding"` (its own learned token and position
            tables, (B, T, d)), `"x"` (κ ∘ LN(x₀) with d learned numbers κ, (B, T, d)), `"zeros"`,
            `"ones"` ((B, T, d)), or `"identity"` ((B, T, D, D) with D = d / heads).
    """

    name: str
    start: str = "embedding"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise RuleError(
                f"stream {self.name!r}: start={self.start!r} must be one of {', '.join(STARTS)}"
            )

    def shape(self, d_model: int, num_heads: int) -> tuple[int, ...]:
        """Shape of one token's value: (d,), or (D, D) for streams that start from identity."""
        head_dim = d_model // num_heads
        return (head_dim, head_dim) if self.start == "identity" else (d_model,)

    def constant(self, x: Tensor, num_heads: int) -> Tensor:
        """A start that nothing is learned of: like x (B, T, d), or (B, T, D, D)."""
        if self.start == "zeros":
            return torch.zeros_like(x)
        if self.start == "ones":
            return torch.ones_like(x)
        head_dim = x.shape[-1] // num_heads
        identity = torch.eye(head_dim, dtype=x.dtype, device=x.device)
        return identity.expand(*x.shape[:-1], head_dim, head_dim)


class UpdateRule(nn.Module):
    """Base of every rule. Subclasses declare streams and scalars and define `step`.

    One instance serves one substep of one layer, with its own scalars and its own norm.

    Class attributes a rule may set:
        streams: the auxiliary streams it carries.
        equation: one line for tables, in the papers' symbols.
        work: what a step costs; a rule that declares nothing is measured (`Work`). Not inherited.
        descent: the options at which a step is exactly x ← x + O(x), for a rule that has such a
            point; `polyak upgrade` starts there. Not inherited.
        fixed: names of scalars that are not learned unless the option `frozen` says else.
        gain: name of the scalar in which x moves linearly, which `polyak upgrade` can fit.
        muon_parameters: names of parameters or submodules of the rule's own whose matrices Muon
            may orthogonalise; AdamW updates everything else that a rule learns.
        scalars, norms, choices: collected from the class body, not set by hand.

    Args:
        d_model: width d of x.
        num_heads: H; rules that see a token as a matrix reshape d to (H, d / H).
        norm_eps: eps of the rule's norms.
        bias: whether they have a bias; RMSNorms never do.
        norm_kind: the model's kind of norm, which theirs follow: `"layer"` or `"rms"`.
        options: the user's `rule_options`: initial values of scalars by name, `frozen` (names of
            scalars that are not learned; `"none"`: all are), `state_norm` or `update_norm`,
            `coefficients` (`constrained`: each scalar is mapped onto its domain; `unconstrained`:
            none is), and the rule's choices.

    Raises:
        ConfigError: an option is unknown or out of range.
    """

    name: ClassVar[str] = ""
    architecture: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    work: ClassVar[Work | None] = None
    descent: ClassVar[Mapping[str, Any] | None] = None
    fixed: ClassVar[tuple[str, ...]] = ()
    gain: ClassVar[str] = "gamma"
    muon_parameters: ClassVar[tuple[str, ...]] = ()
    streams: ClassVar[tuple[Stream, ...]] = ()
    scalars: ClassVar[dict[str, Scalar]] = {}
    norms: ClassVar[dict[str, Norm]] = {}
    choices: ClassVar[dict[str, Choice]] = {}
    State: ClassVar[type[Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = dict(vars(cls))
        cls.scalars = {**cls.scalars, **{k: v for k, v in own.items() if isinstance(v, Scalar)}}
        cls.choices = {**cls.choices, **{k: v for k, v in own.items() if isinstance(v, Choice)}}
        norms = {k: v for k, v in own.items() if isinstance(v, Norm)}
        cls.norms = {**cls.norms, **norms}
        for attribute in norms:  # the instance's submodule of that name must be found instead
            delattr(cls, attribute)
        cls.name = own.get("name") or cls.__name__
        cls.work = own.get("work")  # a subclass may step differently
        cls.descent = own.get("descent")
        if not isinstance(cls.streams, tuple) or not all(
            isinstance(stream, Stream) for stream in cls.streams
        ):
            raise RuleError(f"{cls.__name__}.streams must be a tuple of Stream(...)")
        cls.State = state_type(tuple(stream.name for stream in cls.streams))

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        norm_eps: float = 1e-5,
        bias: bool = False,
        norm_kind: str = "layer",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.options = self.resolve(options or {})
        for attribute, norm in self.norms.items():
            without = self.options[norm.option] == "none"
            made = NoNorm() if without else norm_of(norm_kind, d_model, norm_eps, bias)
            setattr(self, attribute, made)
        for name, scalar in self.present_scalars(self.options).items():
            raw = scalar.starting_at(self.options[name]).parameter(d_model, num_heads)
            raw.requires_grad_(name not in self.options["frozen"])
            self.register_parameter(f"{name}_raw", raw)

    def step(self, x: Tensor, state: Any, oracle: Oracle) -> tuple[Tensor, Any]:
        """One step along depth.

        Args:
            x: residual stream (B, T, d).
            state: the auxiliary streams, by name.
            oracle: O, including its pre-norm: (B, T, d) → (B, T, d).

        Returns:
            The next x and state.
        """
        raise RuleError(f"{type(self).__name__} defines no step(self, x, state, oracle)")

    @classmethod
    def present_scalars(cls, options: Mapping[str, Any]) -> dict[str, Scalar]:
        """The scalars that exist under resolved `options` (some come with a norm only)."""
        free = options.get("coefficients") == "unconstrained"
        return {
            name: scalar.freed() if free else scalar
            for name, scalar in cls.scalars.items()
            if scalar.requires is None or options.get(scalar.requires) == "layer"
        }

    @classmethod
    def resolve(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Every option of the rule with its value: the user's, or the default.

        Raises:
            UnknownNameError: an option the rule does not have; the nearest is offered.
            ConfigError: a value out of range.
        """
        resolved: dict[str, Any] = {norm.option: norm.default for norm in cls.norms.values()}
        allowed: dict[str, tuple[Any, ...]] = dict.fromkeys(resolved, Norm.VALUES)
        if cls.scalars:
            resolved["coefficients"] = COEFFICIENTS[0]
            allowed["coefficients"] = COEFFICIENTS
        resolved |= {name: option.default for name, option in cls.choices.items()}
        allowed |= {name: option.values for name, option in cls.choices.items()}
        for option, values in allowed.items():
            resolved[option] = options.get(option, resolved[option])
            if resolved[option] not in values:
                raise ConfigError(
                    f"rule option {option}={resolved[option]!r} of {cls.name}: "
                    f"use one of {', '.join(map(str, values))}"
                )
        scalars = cls.present_scalars(resolved)
        for name, scalar in scalars.items():
            resolved[name] = scalar.starting_at(options.get(name, scalar.initial)).initial
        frozen = options.get("frozen", cls.fixed)
        frozen = () if frozen in ("none", None) else frozen
        resolved["frozen"] = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        for name in resolved["frozen"]:
            if name not in scalars:
                raise unknown(f"frozen scalar of {cls.name}", str(name), scalars)
        for name in options:
            if name not in resolved:
                raise unknown(f"option of rule {cls.name}", str(name), resolved)
        return resolved

    @classmethod
    def title(cls) -> str:
        """The equation, or the docstring's first line where a rule states none."""
        return cls.equation or (cls.__doc__ or cls.__name__).strip().splitlines()[0]

    def scalar_values(self) -> dict[str, float]:
        """The learned scalars' current values, by name.

        Of a vector NAME, its mean, and under `NAME.std` its standard deviation over the elements.
        """
        values: dict[str, float] = {}
        for name, scalar in self.present_scalars(self.options).items():
            value = getattr(self, name).detach()
            values[name] = float(value.mean())
            if scalar.is_vector:
                values[f"{name}.std"] = float(value.std(correction=0))
        return values


@cache
def state_type(stream_names: tuple[str, ...]) -> type[Any]:
    """A named tuple of these streams with a `replace` method; one type for equal names."""
    # a named tuple is what torch.func, torch.compile and checkpointing know how to take apart
    state = namedtuple("State", stream_names)  # type: ignore[misc]
    state.replace = state._replace  # type: ignore[attr-defined]
    return state


UpdateRule.State = state_type(())
