"""`--sweep`: the rates that every entry chooses from; of several fields, their grid."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polyak.errors import ConfigError
from polyak.settings import parse, replace_all, replace_at
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig

Point = tuple[float, ...]
"""A value of each field."""


@dataclass(frozen=True)
class Grid:
    """Fields of a recipe, and the values that are tried of each, smallest first.

    Attributes:
        fields: dotted keys, as `training.muon_lr`.
        axes: the values of each.
    """

    fields: tuple[str, ...]
    axes: tuple[tuple[float, ...], ...]

    @property
    def points(self) -> list[Point]:
        """Every combination, the last field's values fastest."""
        return list(itertools.product(*self.axes))

    @property
    def label(self) -> str:
        """The fields, for a table's heading."""
        return ", ".join(self.fields)

    def at(self, config: RunConfig, point: Point) -> RunConfig:
        """The run with the values of a point."""
        return replace_all(config, dict(zip(self.fields, point, strict=True)))

    def folder_name(self, point: Point) -> str:
        """`training.muon_lr=0.01-training.adam_lr=0.1`."""
        return "-".join(f"{f}={value}" for f, value in zip(self.fields, point, strict=True))

    def at_edge(self, point: Point) -> bool:
        """Whether a better value may lie outside: one of the point's is the least or the most."""
        return any(
            value in (axis[0], axis[-1]) for value, axis in zip(point, self.axes, strict=True)
        )

    def shown(self, point: Point) -> Any:
        """A point as results.json has it: a number, or of several fields a list of them."""
        return point[0] if len(self.fields) == 1 else list(point)


def parse_grid(texts: Sequence[str], taken: Sequence[str] = ()) -> Grid:
    """The grid of one or several `FIELD=VALUE,VALUE`.

    Args:
        texts: as given with `--sweep`, one at least.
        taken: fields that are set for all entries already, which cannot be swept.

    Raises:
        ConfigError: see `parse_sweep`; or a field is swept twice, or set and swept.
    """
    fields: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, values = parse_sweep(text)
        if name in fields:
            raise ConfigError(f"sweep: {name} is swept twice; give its values in one --sweep")
        if name in taken:
            raise ConfigError(f"sweep={text!r}: {name} is set for all by --set; leave one out")
        fields[name] = values
    return Grid(tuple(fields), tuple(fields.values()))


def parse_sweep(text: str) -> tuple[str, tuple[float, ...]]:
    """`"training.muon_lr=0.01,0.02"` → the field and its values, smallest first.

    Raises:
        ConfigError: not of that form, not a rate, or fewer than two different values.
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    rates = [f"training.{f.name}" for f in dataclasses.fields(TrainingConfig) if f.type == "float"]
    if not equals or name not in rates:
        raise ConfigError(
            f"sweep={text!r}: write one of {', '.join(rates)} and values, as in "
            "training.muon_lr=0.01,0.02"
        )
    numbers = sorted({float(parse(value, float, name)) for value in values.split(",")})
    if len(numbers) < 2:
        raise ConfigError(f"sweep={text!r}: give at least two different values")
    for number in numbers:
        replace_at(RunConfig(), name, number)  # out of range: an error before anything runs
    return name, tuple(numbers)
