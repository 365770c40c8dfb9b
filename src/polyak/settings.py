"""Settings given as text: `KEY=VALUE` onto the fields of configuration dataclasses.

Used for `--set training.muon_lr=0.01`, for sweeps, and for the square brackets behind a rule's
name. A key that is not a field is an error that offers the nearest one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin

from polyak.errors import ConfigError, unknown

Config = TypeVar("Config")


def override(config: Config, assignments: Iterable[str]) -> Config:
    """A copy of a configuration with `path.to.field=value` assignments applied, in order.

    Raises:
        UnknownNameError: a field does not exist; the nearest is offered.
        ConfigError: an assignment has no `=`, or a value does not parse or is out of range.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"setting {assignment!r} has no '='; write KEY=VALUE")
        config = replace_at(config, key.strip(), text.strip())
    return config


def replace_at(config: Config, key: str, value: Any) -> Config:
    """A copy with the field at a dotted key replaced; text is parsed to the field's type."""
    assert dataclasses.is_dataclass(config)
    name, _, rest = key.partition(".")
    fields = [field.name for field in dataclasses.fields(config)]
    if name not in fields:
        raise unknown("setting", name, fields)
    if rest:
        inner = getattr(config, name)
        if isinstance(inner, Mapping):
            new: Any = {**inner, rest: parse_free(value) if isinstance(value, str) else value}
        elif dataclasses.is_dataclass(inner):
            new = replace_at(inner, rest, value)
        else:
            raise ConfigError(f"setting {key!r}: {name} has no fields of its own")
    else:
        new = parse(value, _types(type(config))[name], name) if isinstance(value, str) else value
    return dataclasses.replace(config, **{name: new})  # type: ignore[type-var, return-value]


@cache
def _types(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def parse(text: str, kind: Any, name: str) -> Any:
    """Text as a value of a field's type: numbers, booleans, choices, tuples (`a+b`), None.

    Raises:
        ConfigError: the text is no value of that type; the message names field and type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null") and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        return parse(text, rest[0], name)
    if origin is typing.Literal:
        if text not in arguments:
            raise unknown(name, text, [str(argument) for argument in arguments])
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name}={text!r} must be true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{name}={text!r} must be {what}") from None
    if origin is tuple:
        return tuple(parse(part, arguments[0], name) for part in text.split("+"))
    if kind is str:
        return text
    raise ConfigError(f"{name} cannot be set from text; set its parts, as in {name}.PART=VALUE")


def parse_free(text: str) -> Any:
    """Text as whatever it looks like: a boolean, a number, `a+b` as a tuple, or a string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return tuple(text.split("+")) if "+" in text else text
