"""A rule with options in square brackets, as text: `triple_momentum[stream_start=zeros]`.

Brackets set `ModelConfig` fields, or many by `preset=NAME`; a key that is no field but an option
of the rule goes into `rule_options`. `attention=KIND` sets the kind of attention, and
`attention.OPTION=VALUE` an option of it. Used by `polyak train --rule` and by the entries of a
comparison.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak import rules
from polyak.errors import ConfigError, unknown
from polyak.nn.attention_registry import KINDS
from polyak.nn.config import ModelConfig
from polyak.nn.pieces import known
from polyak.registry import source_of
from polyak.settings import parse_free

_ATTENTION = "attention."


@dataclass(frozen=True)
class RuleText:
    """What such a text says.

    Attributes:
        rule: registered name, or absolute `path/to/file.py:Class`.
        brackets: what stood between the brackets.
        fields: `ModelConfig` fields set in brackets, still as text.
        options: the rule's own options set in brackets.
        attention_options: those of the kind of attention.
    """

    rule: str
    brackets: str
    fields: dict[str, str]
    options: dict[str, Any]
    attention_options: dict[str, Any]

    @property
    def of_the_model(self) -> list[str]:
        """What the brackets set beside the rule's options, as written, in order of the alphabet."""
        return sorted([*self.fields, *(f"{_ATTENTION}{name}" for name in self.attention_options)])

    @property
    def label(self) -> str:
        """The rule's short name and its brackets."""
        name = rules.get(self.rule).name if ":" in self.rule else self.rule
        inside = ",".join(part.strip() for part in self.brackets.split(",") if part.strip())
        return f"{name}[{inside}]" if inside else name


def parse_rule(text: str, option: str = "rule", kept: Path | None = None) -> RuleText:
    """Read a rule with its brackets.

    Args:
        text: for example `"nesterov[mu=0.3, tie_embeddings=false]"`.
        option: what the text was given as, for error messages.
        kept: folder that may have a copy of the rule's code, which counts then.

    Raises:
        ConfigError: the text is not of that form, or sets a key twice.
        UnknownNameError: an unknown rule, field or option; the nearest is offered.
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", text)
    if match is None:
        raise ConfigError(f"{option}: cannot read {text!r}; write rule or rule[key=value,...]")
    rule, brackets = match[1].strip(), match[2] or ""
    rule = _found(rule, kept)
    known_options = sorted({*rules.get(rule).resolve({}), *rules.get(rule).scalars})
    known_fields = [*(field.name for field in dataclasses.fields(ModelConfig)), "preset"]
    fields: dict[str, str] = {}
    options: dict[str, Any] = {}
    attention_options: dict[str, Any] = {}
    given = set[str]()
    for assignment in filter(None, (part.strip() for part in brackets.split(","))):
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise ConfigError(f"{option}: {assignment!r} in {text!r} has no '='; write key=value")
        if key in given:
            raise ConfigError(f"{option}: {key!r} is set twice in {text!r}; remove one")
        given.add(key)
        if key in known_fields and key != "rule":
            fields[key] = _found(value, kept) if key == "attention" else value
        elif key.startswith(_ATTENTION):
            attention_options[key.removeprefix(_ATTENTION)] = parse_free(value)
        elif (name := key.removeprefix("rule_options.")) in known_options:
            options[name] = parse_free(value)
        else:
            raise unknown(f"field or option in {text!r}:", key, [*known_fields, *known_options])
    _check_attention(fields.get("attention"), attention_options)
    return RuleText(rule, brackets, fields, options, attention_options)


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
