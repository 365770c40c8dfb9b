"""Entries of a comparison: a rule with options in square brackets, as text and as a config.

    gradient_descent
    triple_momentum[stream_start=zeros]
    gradient_descent[tie_embeddings=false, update_norm=layer]
    path/to/my_rule.py:MyRule[d_model=160]

The syntax is that of `polyak.nn.rule_text`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.errors import ConfigError
from polyak.nn.config import ModelConfig
from polyak.nn.rule_text import parse_rule, split_entries
from polyak.settings import replace_all


@dataclass(frozen=True)
class Entry:
    """One thing that is compared.

    Attributes:
        name: what tables show: the rule's short name and its brackets.
        model: the resolved configuration.
    """

    name: str
    model: ModelConfig

    @property
    def slug(self) -> str:
        """The name as part of a folder name."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", self.name.replace("[", ".")).strip("_.")


def parse_entries(text: str, base: ModelConfig, kept: Path | None = None) -> tuple[Entry, ...]:
    """Read `--rules`: entries separated by commas, outside brackets.

    Args:
        text: for example `"gradient_descent,triple_momentum[stream_start=zeros]"`.
        base: the model that every entry starts from.
        kept: the comparison's folder, whose copy of a rule's code counts where it has one.

    Raises:
        ConfigError: nothing to compare, a bracket is not closed, or an entry is named twice.
        UnknownNameError: an unknown rule, field or option; the nearest is offered.
    """
    parts = split_entries(text)
    if not parts:
        raise ConfigError("rules: nothing to compare; name at least one rule")
    entries = tuple(parse_entry(part, base, kept) for part in parts)
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.name, entry)
        if other.model.rule != entry.model.rule:
            raise ConfigError(
                f"rules: {other.model.rule} and {entry.model.rule} are both called "
                f"{entry.name!r}; rename one"
            )
        if other is not entry:
            raise ConfigError(f"rules: {entry.name!r} is named twice; remove one")
    return entries


def parse_entry(text: str, base: ModelConfig, kept: Path | None = None) -> Entry:
    """One entry; see `parse_entries`."""
    found = parse_rule(text, option="rules", kept=kept)
    if "context_length" in found.fields:
        raise ConfigError(
            f"rules: {text!r}: entries that differ in context_length would not see the same "
            "batches; set it for all, with --set model.context_length=N"
        )
    plain: dict[str, Any] = {"rule": "gradient_descent", "attention": "softmax"}
    plain |= {"rule_options": {}, "attention_options": {}, "stream_start": None}
    model = dataclasses.replace(base, **plain)
    settings = dict(found.fields)
    start = settings.pop("stream_start", base.stream_start)
    attention = settings.pop("attention", None)
    model = replace_all(model, settings)
    if attention is None:
        attention = model.attention if "preset" in settings else base.attention
    inherited = base.attention_options if attention == base.attention else {}
    if start is not None and str(start).lower() == "none":
        start = None
    model = dataclasses.replace(
        model,
        rule=found.rule,
        rule_options={**base.rule_options, **found.options},
        stream_start=start,  # type: ignore[arg-type]  # checked by ModelConfig
        attention=attention,
        attention_options={**inherited, **found.attention_options},
    )
    return Entry(found.label, model)


def widened(baseline: Entry, target: int) -> Entry:
    """The baseline at the width whose parameter count is nearest to `target`.

    Widths are multiples of the number of heads that positions of the model's kind allow; depth
    and heads stay.
    """
    from polyak.nn.cost import cost

    heads = baseline.model.num_heads
    step = _unit(baseline.model) // heads

    def at(multiple: int) -> ModelConfig:
        return dataclasses.replace(baseline.model, d_model=multiple * heads)

    multiple = baseline.model.d_model // heads
    while cost(at(multiple + step)).total_parameters <= target:
        multiple += step
    best = min(
        (multiple, multiple + step), key=lambda m: abs(cost(at(m)).total_parameters - target)
    )
    model = at(best)
    return Entry(_label_with(baseline.name, f"d_model={model.d_model}"), model)


def _unit(model: ModelConfig) -> int:
    """Of what widths are multiples: of the heads, and of what pairs of dimensions need."""
    if model.positions == "rope":
        return 2 * model.num_heads
    pairs = {"added": 2, "concatenated": 4}[model.position_mix]
    return math.lcm(model.num_heads, pairs) if model.positions == "sinusoidal" else model.num_heads


def _label_with(name: str, option: str) -> str:
    return f"{name[:-1]},{option}]" if name.endswith("]") else f"{name}[{option}]"
