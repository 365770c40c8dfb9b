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

from polyak.compare.config import MatchBy
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


def enlarged(baseline: Entry, target: int, by: MatchBy = "width") -> Entry:
    """The baseline with as many parameters as `target`, or as near as `by` allows.

    Widths are multiples of the number of heads that positions of the model's kind allow; depth
    and heads stay. A second table is as large as it is.

    Raises:
        ConfigError: a second table is there already.
    """
    model = baseline.model
    if by == "reinjection":
        if model.embedding_reinjection:
            raise ConfigError(
                f"match_by='reinjection': {baseline.name} has its second table already; use "
                "--match-by width or residual_width"
            )
        option = "embedding_reinjection=true"
        model = dataclasses.replace(model, embedding_reinjection=True)
    else:
        name = "d_model" if by == "width" else "residual_width"
        width = _width_for(model, target, name)
        option = f"{name}={width}"
        model = dataclasses.replace(model, **{name: width})  # type: ignore[arg-type]
    return Entry(_label_with(baseline.name, option), model)


def _width_for(model: ModelConfig, target: int, name: str) -> int:
    """The value of `name`, from today's on, whose parameter count is nearest to `target`."""
    from polyak.nn.cost import cost

    def count(width: int) -> int:
        changed = dataclasses.replace(model, **{name: width})  # type: ignore[arg-type]
        return cost(changed).total_parameters

    step = _unit(model, name)
    width = model.d_model if name == "d_model" else model.stream_width
    while count(width + step) <= target:
        width += step
    return min((width, width + step), key=lambda w: abs(count(w) - target))


def _unit(model: ModelConfig, name: str) -> int:
    """Of what widths are multiples: of the heads, and of what pairs of dimensions need."""
    heads = model.num_heads
    if model.positions == "rope" and name == "d_model":
        return 2 * heads
    pairs = {"added": 2, "concatenated": 4}[model.position_mix]
    return math.lcm(heads, pairs) if model.positions == "sinusoidal" else heads


def _label_with(name: str, option: str) -> str:
    return f"{name[:-1]},{option}]" if name.endswith("]") else f"{name}[{option}]"
