"""Which model a released checkpoint holds, from the names and shapes of its weights.

A rule shows in the names of one layer's scalars and norms and in the tables of its streams: they
are compared, as sets, with what each registered rule would have. Options that the release does not
have (a norm left out) count only where nothing else fits. The number of heads leaves no trace in
the weights and is taken as d/64, as in every released model, unless it is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from polyak import rules
from polyak.errors import ConfigError, RunError
from polyak.interop.release import TIED_OUTPUT, released_names
from polyak.nn.config import ModelConfig
from polyak.nn.rule_places import is_composite
from polyak.nn.rule_text import RuleText
from polyak.nn.transformer import Transformer

RELEASED_HEAD_DIM = 64


@dataclass(frozen=True)
class Candidate:
    """A rule with options that decide which weights exist.

    Attributes:
        rule: its name.
        start: `stream_start`.
        options: its rule options.
        usual: whether the release has such models.
    """

    rule: str
    start: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    usual: bool = True

    @property
    def label(self) -> str:
        """As `--rule` takes it."""
        inside = [f"{name}={value}" for name, value in self.options.items()]
        inside += [f"stream_start={self.start}"] if self.start else []
        return f"{self.rule}[{','.join(inside)}]" if inside else self.rule

    def names(self) -> set[str]:
        """Released names of a model of one layer."""
        config = ModelConfig(
            rule=self.rule,
            rule_options=self.options,
            stream_start=self.start,
            num_layers=1,
            num_heads=1,
            d_model=4,
            vocab_size=2,
            context_length=2,
        )
        with torch.device("meta"):
            return set(released_names(Transformer(config)).values())


def detect(
    state: Mapping[str, Tensor], wanted: RuleText | None = None, num_heads: int | None = None
) -> ModelConfig:
    """The configuration of the model whose released weights these are.

    Args:
        state: weights by released name, without prefixes.
        wanted: the rule, where the user names it; what its brackets leave open is detected.
        num_heads: H, where the user names it.

    Raises:
        RunError: not a released checkpoint, or none of `wanted`.
        ConfigError: several rules fit, or the number of heads cannot be taken for granted.
    """
    for name, what in (("tok_emb", "token"), ("pos_emb", "position")):
        table = state.get(f"{name}.weight")
        if table is None or table.dim() != 2:
            raise RunError(f"not a released checkpoint: it has no {what} table {name}.weight")
    vocab_size, d_model = state["tok_emb.weight"].shape
    layers = {int(m[1]) for name in state if (m := re.match(r"layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or not layers:
        raise RunError(
            f"not a whole checkpoint: it has layers {sorted(layers)[:4]}, they must run from 0"
        )
    candidate = _rule(state, wanted)
    return ModelConfig(
        rule=candidate.rule,
        rule_options=candidate.options,
        stream_start=candidate.start,
        num_layers=len(layers),
        num_heads=num_heads or _heads(d_model),
        d_model=d_model,
        vocab_size=vocab_size,
        context_length=state["pos_emb.weight"].shape[0],
    )


def _heads(d_model: int) -> int:
    if d_model % RELEASED_HEAD_DIM:
        raise ConfigError(
            f"the number of heads leaves no trace in the weights, and d_model={d_model} is no "
            f"multiple of {RELEASED_HEAD_DIM}, the head width of the release; give --num-heads"
        )
    return d_model // RELEASED_HEAD_DIM


def _rule(state: Mapping[str, Tensor], wanted: RuleText | None) -> Candidate:
    found = {n for n in state if not re.match(r"layers\.[1-9]", n)} - {TIED_OUTPUT}
    everything = [c for name in rules.names() for c in _variants(name)]
    fitting = [c for c in everything if c.names() == found]
    if wanted is not None:
        asked = list(_variants(wanted.rule, wanted))
        mine = [c for c in asked if c.names() == found]
        if not mine:
            fits = ", ".join(c.label for c in fitting) or "no rule that is known here"
            raise RunError(f"--rule {wanted.label}: {_difference(asked, found)}; they fit {fits}")
        fitting = mine
    fitting = [c for c in fitting if c.usual] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(c.label for c in fitting)
        raise ConfigError(f"the weights fit several rules ({names}); say which with --rule")
    raise RunError(f"the weights fit no rule that is known here: {_difference(everything, found)}")


def _difference(candidates: list[Candidate], found: set[str]) -> str:
    """How the nearest candidate differs from the names that were found."""
    nearest = min(candidates, key=lambda c: len(c.names() ^ found))
    names = nearest.names()
    parts = [
        f"{what} {', '.join(sorted(some)[:3])}{' …' if len(some) > 3 else ''}"
        for what, some in (("missing", names - found), ("unexpected", found - names))
        if some
    ]
    return f"the weights are not of {nearest.label} ({'; '.join(parts)})"


def _variants(name: str, wanted: RuleText | None = None) -> Iterator[Candidate]:
    """A rule in every form that shows in the weights; what the user's brackets set stays."""
    if is_composite(name):
        raise ConfigError(f"--rule {name}: released checkpoints have one rule everywhere")
    rule = rules.get(name)
    fields = {} if wanted is None else dict(wanted.fields)
    given = {} if wanted is None else wanted.options
    others = () if wanted is None else wanted.of_the_model
    if other := [name for name in others if name != "stream_start"]:
        raise ConfigError(f"--rule: {other[0]} is read from the weights; leave it out")
    starts: list[Any] = [None]
    if any(stream.start == "embedding" for stream in rule.streams):
        start = fields.get("stream_start")
        starts = [None, "zeros"] if start is None else [None if start == "none" else start]
    free = [norm for norm in rule.norms.values() if norm.option not in given]
    for start, values in product(starts, product(*(norm.VALUES for norm in free))):
        chosen = dict(zip(free, values, strict=True))
        options = {n.option: value for n, value in chosen.items() if value != n.default}
        yield Candidate(name, start, {**given, **options}, usual=not options)
