"""A rule with options in square brackets, as text: `triple_momentum[stream_start=zeros]`.

Brackets set `ModelConfig` fields, or many by `preset=NAME`; a key that is no field but an option
of the rule goes into `rule_options`. `attention=KIND` sets the kind of attention, and
`attention.OPTION=VALUE` an option of it. Several rules, each with its place, have their own options
in the brackets behind them, and any of these may hold what belongs to the model. Used by
`polyak train --rule` and by the entries of a comparison.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyak import rules
from polyak.errors import ConfigError, unknown
from polyak.nn.attention_registry import KINDS
from polyak.nn.config import ModelConfig
from polyak.nn.pieces import known
from polyak.nn.rule_places import Part, is_composite, parts_of, text_of
from polyak.registry import source_of
from polyak.settings import parse_free

_ATTENTION = "attention."


@dataclass(frozen=True)
class RuleText:
    """What such a text says.

    Attributes:
        rule: registered name, or absolute `path/to/file.py:Class`; of several rules, the text
            for `ModelConfig.rule`, each with its own options in brackets.
        label: short names and what stood in brackets, for tables.
        fields: `ModelConfig` fields set in brackets, still as text.
        options: the rule's own options set in brackets; of several rules, none.
        attention_options: those of the kind of attention.
    """

    rule: str
    label: str
    fields: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    attention_options: dict[str, Any] = field(default_factory=dict)

    @property
    def of_the_model(self) -> list[str]:
        """What the brackets set beside the rule's options, as written, in order of the alphabet."""
        return sorted([*self.fields, *(f"{_ATTENTION}{name}" for name in self.attention_options)])


def parse_rule(text: str, option: str = "rule", kept: Path | None = None) -> RuleText:
    """Read a rule with its brackets, or several with their places.

    Args:
        text: for example `"nesterov[mu=0.3, tie_embeddings=false]"`.
        option: what the text was given as, for error messages.
        kept: folder that may have a copy of the rule's code, which counts then.

    Raises:
        ConfigError: the text is not of that form, or sets a key twice.
        UnknownNameError: an unknown rule, field or option; the nearest is offered.
    """
    found = RuleText("", "")
    written, labels = [], []
    for part in _parts(text, option):
        part = part.named(_found(part.rule, kept))
        own = _sorted_out(part, text, option, found, kept)
        written.append(Part(part.rule, ",".join(f"{k}={v}" for k, v in own.items()), part.place))
        name = rules.get(part.rule).name if ":" in part.rule else part.rule
        labels.append(part.named(name))
    _check_attention(found.fields.get("attention"), found.attention_options)
    if is_composite(text):
        return dataclasses.replace(found, rule=text_of(written), label=text_of(labels))
    (part,) = written
    return dataclasses.replace(found, rule=part.rule, label=text_of(labels), options=part.options)


def split_entries(text: str) -> list[str]:
    """Rules separated by commas, outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _parts(text: str, option: str) -> tuple[Part, ...]:
    if is_composite(text):
        return parts_of(text)
    match = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", text)
    if match is None:
        raise ConfigError(
            f"{option}: cannot read {text!r}; write rule or rule[key=value,...], or several with "
            "their places, as in rule[...]@attention+rule[...]@mlp"
        )
    return (Part(match[1].strip(), match[2] or ""),)


def _sorted_out(
    part: Part, text: str, option: str, found: RuleText, kept: Path | None
) -> dict[str, str]:
    """The rule's own options, as text; what belongs to the model is added to `found`."""
    rule = rules.get(part.rule)
    known_options = sorted({*rule.resolve({}), *rule.scalars})
    known_fields = [*(field.name for field in dataclasses.fields(ModelConfig)), "preset"]
    own: dict[str, str] = {}
    for key, value in part.assignments(option, text, given=found.of_the_model):
        if key in known_fields and key != "rule":
            found.fields[key] = _found(value, kept) if key == "attention" else value
        elif key.startswith(_ATTENTION):
            found.attention_options[key.removeprefix(_ATTENTION)] = parse_free(value)
        elif (name := key.removeprefix("rule_options.")) in known_options:
            own[name] = value
        else:
            raise unknown(f"field or option in {text!r}:", key, [*known_fields, *known_options])
    return own


def _found(name: str, kept: Path | None) -> str:
    """A piece's name, absolute where it is a file, for other processes; or its copy in `kept`."""
    if source_of(name) is None:
        return name
    file, _, class_name = name.rpartition(":")
    # a shell expands no "~" after a comma
    name = f"{Path(file).expanduser().resolve()}:{class_name}"
    return name if kept is None else known(kept, name)


def _check_attention(kind: str | None, options: dict[str, Any]) -> None:
    """Options of a kind that is named beside them; others are checked with the whole model."""
    declared = {} if kind is None else KINDS.get(kind).declared
    for name in options if declared else ():
        if name not in declared:
            raise unknown(f"option of attention {KINDS.get(str(kind)).name}", name, declared)
