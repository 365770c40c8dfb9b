"""A grid of options: factors with their levels as text, and the entry that each cell is.

    rule=gradient_descent[update_norm=layer],spherical;embedding_norm=none,layer

Factors are separated by `;`, levels by commas outside brackets. A factor is `rule`, or whatever may
stand in an entry's brackets: a field of `ModelConfig`, `preset`, an option of every rule, or
`attention.OPTION`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyak import rules
from polyak.compare.entries import Entry, parse_entry
from polyak.errors import ConfigError, PolyakError, unknown
from polyak.nn.config import ModelConfig
from polyak.nn.rule_places import Part, is_composite, names_in, parts_of, text_of
from polyak.nn.rule_text import split_entries

RULE = "rule"


@dataclass(frozen=True)
class Factor:
    """An option that differs between cells, and its levels; effects are relative to the first."""

    name: str
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One combination of levels.

    Attributes:
        levels: of each factor, by place.
        text: the entry of a comparison that it is.
        entry: the same, resolved.
    """

    levels: tuple[int, ...]
    text: str
    entry: Entry


def parse_factors(text: str) -> tuple[Factor, ...]:
    """Read `--factors`.

    Raises:
        ConfigError: no factor, one without `=`, with fewer than two levels, a level or a factor
            twice.
    """
    factors: dict[str, Factor] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, given = (word.strip() for word in part.partition("="))
        levels = tuple(split_entries(given))
        if not equals or not name or not levels:
            raise ConfigError(f"factors: cannot read {part!r}; write NAME=LEVEL,LEVEL")
        if name in factors:
            raise ConfigError(f"factors: {name} is named twice; give its levels in one place")
        if len(levels) < 2:
            fixed = f"--rule {levels[0]}" if name == RULE else f"--set model.{name}={levels[0]}"
            raise ConfigError(
                f"factors: {name} has one level, {levels[0]}; give at least two, or set it for all "
                f"cells with {fixed}"
            )
        if len(set(levels)) < len(levels):
            twice = next(level for level in levels if levels.count(level) > 1)
            raise ConfigError(f"factors: {name} has the level {twice} twice; remove one")
        factors[name] = Factor(name, levels)
    if not factors:
        raise ConfigError(
            "factors: nothing differs; name at least one factor, as in "
            "rule=gradient_descent,triple_momentum;embedding_norm=none,layer"
        )
    return tuple(factors.values())


def cells_of(
    factors: Sequence[Factor], rule: str, base: ModelConfig, kept: Path | None = None
) -> list[Cell]:
    """Every combination, the last factor's levels fastest.

    Args:
        factors: of the grid.
        rule: of all cells, where the rule is no factor.
        base: the model that every cell starts from.
        kept: the comparison's folder, whose copy of a rule's code counts where it has one.

    Raises:
        UnknownNameError: a factor is neither a field of the model nor an option of a rule.
        ConfigError: a cell cannot be built; it is named, with the reason.
    """
    _check_names(factors, rule)
    cells = []
    for levels in itertools.product(*(range(len(factor.levels)) for factor in factors)):
        chosen = {f.name: f.levels[level] for f, level in zip(factors, levels, strict=True)}
        own = chosen.pop(RULE, rule)
        text = with_options(own, ",".join(f"{name}={value}" for name, value in chosen.items()))
        try:
            cells.append(Cell(levels, text, parse_entry(text, base, kept)))
        except PolyakError as error:
            raise ConfigError(f"factors: the cell {text} cannot be built: {error}") from error
    return cells


def _check_names(factors: Sequence[Factor], rule: str) -> None:
    named = next((factor.levels for factor in factors if factor.name == RULE), (rule,))
    fields = [RULE, "preset", *(field.name for field in dataclasses.fields(ModelConfig))]
    for name in dict.fromkeys(name for text in named for name in names_in(_bare(text))):
        kind = rules.get(name)
        fields += [*kind.resolve({}), *kind.scalars]
    for factor in factors:
        if factor.name not in fields and not factor.name.startswith("attention."):
            raise unknown("factor", factor.name, list(dict.fromkeys(fields)))


def _bare(text: str) -> str:
    """A rule's text without its brackets."""
    return re.sub(r"\[[^\[\]]*\]", "", text)


def with_options(text: str, options: str) -> str:
    """A rule's text with more in its brackets; of several rules, in the last one's."""
    if not options:
        return text
    if is_composite(text):
        *before, last = parts_of(text)
        return text_of([*before, Part(last.rule, _joined(last.brackets, options), last.place)])
    name, bracket, inside = text.partition("[")
    return f"{name.strip()}[{_joined(inside.removesuffix(']') if bracket else '', options)}]"


def _joined(*options: str) -> str:
    return ",".join(part for part in options if part.strip())
