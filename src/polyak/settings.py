"""Settings given as text: `KEY=VALUE` onto the fields of configuration dataclasses.

Used for `--set training.muon_lr=0.01`, for sweeps, and for the square brackets behind a rule's
name. A key that is not a field is an error that offers the nearest one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from polyak.errors import ConfigError, shown_value, unknown

Config = TypeVar("Config")


def override(config: Config, assignments: Iterable[str]) -> Config:
    """A copy of a configuration with `path.to.field=value` assignments applied, all at once.

    All at once, because two fields can be right together and wrong one by one: `num_heads=5`
    and `d_model=150`. Of two assignments to one field, the later counts.

    Raises:
        UnknownNameError: a field does not exist; the nearest is offered.
        ConfigError: an assignment has no `=`, or a value does not parse or is out of range.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"setting {assignment!r} has no '='; write KEY=VALUE")
        values[key.strip()] = text.strip()
    return replace_all(config, values)


def replace_at(config: Config, key: str, value: Any) -> Config:
    """A copy with the field at a dotted key replaced; text is parsed to the field's type."""
    return replace_all(config, {key: value})


def replace_all(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with the fields at dotted keys replaced; text is parsed to each field's type.

    A configuration that has presets takes the key `preset` too, for all fields that one sets.
    """
    assert dataclasses.is_dataclass(config)
    fields = [field.name for field in dataclasses.fields(config)]
    whole: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    preset = values.get("preset") if hasattr(config, "preset_fields") else None
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if preset is not None and key == "preset":
            continue
        if name not in fields:
            raise unknown("setting", name, fields)
        if rest:
            parts.setdefault(name, {})[rest] = value
        else:
            kind = _field_types(type(config))[name]
            whole[name] = parse(value, kind, name) if isinstance(value, str) else value
    if preset is not None and hasattr(config, "preset_fields"):
        # what is set beside a preset wins, wherever it stands
        whole = {**config.preset_fields(preset, whole.get("num_heads")), **whole}
    for name, inside in parts.items():
        inner = whole.get(name, getattr(config, name))
        if isinstance(inner, Mapping):
            free = {k: parse_free(v) if isinstance(v, str) else v for k, v in inside.items()}
            whole[name] = {**inner, **free}
        elif dataclasses.is_dataclass(inner):
            whole[name] = replace_all(inner, inside)
        else:
            key = f"{name}.{next(iter(inside))}"
            raise ConfigError(f"setting {key!r}: {name} has no fields of its own")
    return dataclasses.replace(config, **whole)  # type: ignore[type-var]


def _field_types(config: type) -> dict[str, Any]:
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


def convert(value: Any, kind: Any, name: str) -> Any:
    """A value of a field's type: text as `parse` reads it, or a typed value, as from TOML.

    Whole numbers serve as numbers, lists as tuples; no other type stands for another, so text
    does not stand for a number in a file that has numbers of its own.

    Raises:
        ConfigError: the value is of another type; the message names field and type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = next(argument for argument in arguments if argument is not type(None))
        return convert(value, kind, name)
    if origin is typing.Literal and isinstance(value, str):
        return parse(value, kind, name)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _option(inner, f"{name}.{key}") for key, inner in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(part, arguments[0], name) for part in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) < 1e308:
        return float(value)
    if (kind is int and number and isinstance(value, int)) or (
        kind in (str, bool) and isinstance(value, kind)
    ):
        return value
    what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    expected = what.get(kind) or (
        "a list of numbers" if origin is tuple else "a table" if origin is dict else "text"
    )
    raise ConfigError(f"{name}={shown_value(value)} must be {expected}")


def _option(value: Any, name: str) -> Any:
    """An option of a rule: a number, text, true or false, or a list of them."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(part is None or isinstance(part, int | float | str) for part in parts):
        raise ConfigError(f"{name}={shown_value(value)} must be a number, text, true or false")
    return value


def typed(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from a file for the fields of a configuration dataclass, each of its field's type.

    Fields whose type is a configuration of its own are left as they are.

    Raises:
        ConfigError: a value is of another type; the message names field and type.
    """
    hints = _field_types(kind)
    return {
        name: value if dataclasses.is_dataclass(hints[name]) else convert(value, hints[name], name)
        for name, value in values.items()
    }


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


def defaults(kind: type) -> dict[str, Any]:
    """The defaults of a configuration dataclass by field; fields that have none are left out."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def check_keys(kind: type, values: Iterable[str], what: str) -> None:
    """See that every key is a field of a configuration dataclass.

    Raises:
        UnknownNameError: one is not; the nearest is offered.
    """
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in fields:
            raise unknown(what, key, fields)
