"""Which rule steps at which substep of a model, with the streams of all of them.

A model has one rule everywhere, or several parts (`polyak.nn.rule_places`). Everything that asks
for a model's rule asks here. The state is the union of the rules' streams, by name: two rules with
a stream of one name share it. A rule sees its own streams; the others pass through unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from polyak.errors import ConfigError
from polyak.nn.controls import REINJECTED
from polyak.nn.rule_places import SUBSTEPS, Part, parts_of, short, text_of

if TYPE_CHECKING:
    from torch import Tensor

    from polyak.rules import Oracle, State, Stream, UpdateRule
    from polyak.rules._work import StepCost


ModelConfig: TypeAlias = Any
"""A `polyak.nn.config.ModelConfig`, which asks here whether its rule can be."""


@dataclass(frozen=True)
class Placed:
    """A rule with its options, as a substep has it.

    Attributes:
        part: what the model's text says of it.
        rule: the class.
        options: its options as the user gave them.
    """

    part: Part
    rule: type[UpdateRule]
    options: dict[str, Any]

    def make(self, config: ModelConfig) -> UpdateRule:
        """An instance, for one substep of one layer."""
        return self.rule(config.stream_width, config.num_heads, **self._settings(config))

    def step_cost(self, config: ModelConfig) -> StepCost:
        """One token's cost of one step.

        Raises:
            RuleError: the rule declares no cost and its step fails when run to measure it.
        """
        from polyak.rules._cost import step_cost

        return step_cost(self.rule, config.stream_width, config.num_heads, **self._settings(config))

    def _settings(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "norm_eps": config.norm_eps,
            "bias": config.bias,
            "norm_kind": config.norm,
            "options": self.options,
        }


@dataclass(frozen=True)
class Placement:
    """A model's rules: `layers[i][substep]` is what steps there.

    Attributes:
        name: the rule's name, or the parts with short names.
        parts: each part once, as the text has them.
        layers: by layer, substep → what is placed there.
        streams: every stream of the state, as it starts in this model, in order of first use.
    """

    name: str
    parts: tuple[Placed, ...]
    layers: tuple[dict[str, Placed], ...]
    streams: tuple[Stream, ...]

    @cached_property
    def State(self) -> type[Any]:  # as `UpdateRule.State`
        """The type of the state: a named tuple of the streams."""
        from polyak.rules._base import state_type

        return state_type(tuple(stream.name for stream in self.streams))

    def __getstate__(self) -> dict[str, Any]:
        # a state's type is made while running, and cannot be pickled
        return {name: value for name, value in self.__dict__.items() if name != "State"}

    @property
    def only(self) -> type[UpdateRule]:
        """The model's one rule.

        Raises:
            ConfigError: it has several.
        """
        if len(self.parts) > 1:
            raise ConfigError(f"{self.name} is not one rule; ask for the model's placement")
        return self.parts[0].rule

    @property
    def title(self) -> str:
        """The equation, or each part's behind its place."""
        if len(self.parts) == 1:
            return self.parts[0].rule.title()
        return " · ".join(
            f"{'else' if placed.part.place is None else placed.part.place}: {placed.rule.title()}"
            for placed in self.parts
        )

    def steps(self) -> Iterator[tuple[str, Placed]]:
        """(substep, what is placed there) of every step, in order."""
        return (step for layer in self.layers for step in layer.items())


def placement_of(config: ModelConfig) -> Placement:
    """The rules of a model's configuration.

    Raises:
        UnknownNameError: a rule or an option that there is none of; the nearest is offered.
        ConfigError: a place does not exist, or is taken twice; a substep has no rule, or a part
            no substep; two streams of one name start differently.
        PolyakError: a user's file does not import or does not define the class.
    """
    from polyak import rules

    parts = parts_of(config.rule)
    if len(parts) == 1 and parts[0].place is None:
        if ":" not in config.rule and re.search(r"[@+]", config.rule):
            raise ConfigError(
                f"rule={config.rule!r} cannot be read; write RULE@PLACE+RULE, as in "
                "residual_momentum@attention+gradient_descent@mlp"
            )
        rule = rules.get(parts[0].rule)
        rule.resolve(config.rule_options)
        one = Placed(parts[0], rule, dict(config.rule_options))
        layer = dict.fromkeys(SUBSTEPS[config.splitting], one)
        streams = _with_reinjected(rule.streams, config)
        return Placement(rule.name, (one,), (layer,) * config.num_layers, streams)
    if config.rule_options:
        raise ConfigError(
            f"rule_options={config.rule_options!r} do not say whose they are in "
            f"rule={short(config.rule)!r}; put them in brackets behind a name"
        )
    owners = _owners(parts, config)
    placed = []
    for part in parts:
        rule = rules.get(part.rule)
        rule.resolve(part.options)
        placed.append(Placed(part, rule, part.options))
    by_part = dict(zip(parts, placed, strict=True))
    layers = tuple({s: by_part[part] for s, part in layer.items()} for layer in owners)
    steps = [one.rule for layer in layers for one in layer.values()]
    named = [one.part.named(one.rule.name) for one in placed]
    streams = _with_reinjected(_union(steps, config), config)
    return Placement(text_of(tuple(named)), tuple(placed), layers, streams)


def _owners(parts: tuple[Part, ...], config: ModelConfig) -> list[dict[str, Part]]:
    """Which part has which substep of which layer."""
    substeps = SUBSTEPS[config.splitting]
    rest = [part for part in parts if part.place is None]
    if len(rest) > 1:
        raise ConfigError(
            f"rule: {_said(rest[0])} and {_said(rest[1])} both have no place; one part may take "
            "the rest, the other needs a place such as @attention or @1-6"
        )
    layers: list[dict[str, Part]] = [{} for _ in range(config.num_layers)]
    for part in parts:
        if part.place is None:
            continue
        first, last = part.layers or (1, config.num_layers)
        if not 1 <= first <= last <= config.num_layers:
            raise ConfigError(
                f"rule: {_said(part)}: layers run from 1 to {config.num_layers} in this model; "
                "use a range within them"
            )
        if part.substep is not None and (part.substep == "layer" or part.substep not in substeps):
            raise ConfigError(
                f"rule: {_said(part)}: with splitting='simultaneous' a layer is one step, and "
                "there is no place attention or mlp; use layers only, such as @1-6"
                if config.splitting == "simultaneous" and part.substep in ("attention", "mlp")
                else f"rule: {_said(part)}: there is no place {part.substep!r}; use attention, "
                "mlp, layers such as 3 or 1-6, or both, as in 1-6.attention"
            )
        for layer in range(first - 1, last):
            for substep in substeps if part.substep is None else (part.substep,):
                if substep in layers[layer]:
                    raise ConfigError(
                        f"rule: {_said(layers[layer][substep])} and {_said(part)} both take "
                        f"{_where(substep, layer)}; places may not overlap"
                    )
                layers[layer][substep] = part
    taken = False
    for index, layer_of in enumerate(layers):
        for substep in substeps:
            if substep in layer_of:
                continue
            if not rest:
                raise ConfigError(
                    f"rule: no part of {short(config.rule)!r} takes {_where(substep, index)}; add "
                    "one without a place, such as +gradient_descent"
                )
            layer_of[substep] = rest[0]
            taken = True
    if rest and not taken:
        raise ConfigError(
            f"rule: nothing is left for {_said(rest[0])}, as the other parts take every step; "
            "remove it, or give it a place"
        )
    # in the order in which a layer steps
    return [{substep: layer[substep] for substep in substeps} for layer in layers]


def _union(steps: list[type[UpdateRule]], config: ModelConfig) -> tuple[Stream, ...]:
    """Every stream once, in order of first use."""
    found: dict[str, tuple[Stream, type[UpdateRule]]] = {}
    for rule in steps:
        for stream in rule.streams:
            other, owner = found.setdefault(stream.name, (stream, rule))
            if start_of(other, config) != start_of(stream, config):
                raise ConfigError(
                    f"rule: stream {stream.name!r} starts from {other.start} in {owner.name} and "
                    f"from {stream.start} in {rule.name}, but streams of one name are one stream; "
                    "use rules whose streams start alike"
                    + (
                        ", or stream_start='zeros'"
                        if {other.start, stream.start} == {"embedding", "zeros"}
                        else ""
                    )
                )
            if stream.start == "embedding":  # which stream_start can set to zeros
                found[stream.name] = stream, rule
    return tuple(stream for stream, _ in found.values())


def start_of(stream: Stream, config: ModelConfig) -> str:
    """Where a stream starts in this model: as `Stream.start`, or `x`."""
    free = stream.start == "embedding" and stream.name != REINJECTED
    return config.stream_start or stream.start if free else stream.start


def _with_reinjected(streams: tuple[Stream, ...], config: ModelConfig) -> tuple[Stream, ...]:
    """The rules' streams, and the one that is added to x before every layer."""
    from polyak.rules import Stream

    if not config.embedding_reinjection:
        return streams
    if any(stream.name == REINJECTED for stream in streams):
        raise ConfigError(
            f"embedding_reinjection=True has a stream {REINJECTED!r} of its own, and rule "
            f"{short(config.rule)} has one of that name; rename the rule's"
        )
    return *streams, Stream(REINJECTED)


def _said(part: Part) -> str:
    return str(part.named(part.rule.rpartition(":")[2]))


def _where(substep: str, layer: int) -> str:
    return f"layer {layer + 1}" if substep == "layer" else f"{substep} of layer {layer + 1}"


def own_streams(rule: UpdateRule, state: State) -> State:
    """The part of a model's state that is a rule's own."""
    own = rule.State
    if type(state) is own:
        return state
    return own(*(getattr(state, name) for name in own._fields))


def step(rule: UpdateRule, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
    """One step of a rule in a model's state; streams of other rules pass through unchanged."""
    if type(state) is rule.State:
        return rule.step(x, state, oracle)
    x, after = rule.step(x, own_streams(rule, state), oracle)
    return x, state.replace(**after._asdict())
