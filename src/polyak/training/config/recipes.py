"""Recipes: runs described in small TOML files that derive from one another. Imports no torch.

    base = "paper-openwebtext"       # a recipe's name, or another file beside this one
    corpus = "~/texts"               # fields of RunConfig

    [model]                          # fields of ModelConfig
    num_layers = 6

    [training]                       # fields of TrainingConfig
    steps = 5000
    micro_batch_size = "none"        # TOML has no null; text `none` stands for it

A recipe sets what differs from its base; what nobody sets keeps the dataclasses' default, except
`model.vocab_size`, which is then the tokenizer's. polyak's own recipes lie in `recipe_files`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from polyak.errors import ConfigError, UnknownNameError, unknown
from polyak.nn.config import ModelConfig
from polyak.nn.presets import RULES, Preset, preset_fields
from polyak.settings import convert, parse, parse_free
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig

Settings = dict[str, Any]
"""Dotted key (`training.steps`, `corpus`) → value of the field's type."""

SECTIONS: dict[str, type] = {"model": ModelConfig, "training": TrainingConfig}
FREE = "model.rule_options."
ATTENTION = "model.attention_options."
OPTIONS = (FREE, ATTENTION)
"""Tables whose keys are a piece's own options, for the rule or the kind of attention."""
PRESET = "model.preset"
"""No field of its own: it stands for all that a preset of `ModelConfig` sets."""


def names() -> tuple[str, ...]:
    """polyak's own recipes, sorted."""
    folder = files("polyak.training.config") / "recipe_files"
    found = (Path(entry.name) for entry in folder.iterdir())
    return tuple(sorted(path.stem for path in found if path.suffix == ".toml"))


def load(name_or_path: str) -> RunConfig:
    """The run that a recipe describes.

    Args:
        name_or_path: one of `names()`, or the path of a TOML file.

    Raises:
        UnknownNameError: no such recipe, base or key; the nearest is offered.
        ConfigError: not TOML, a value of the wrong type or out of range, or a cycle of bases.
    """
    return build(read(name_or_path), f"recipe {name_or_path}: ")


def read(name_or_path: str) -> Settings:
    """What a recipe and its bases set; see `load` for what is refused."""
    return _read(name_or_path, Path(), ())


def build(settings: Mapping[str, Any], prefix: str = "") -> RunConfig:
    """The run with these settings and defaults for the rest.

    Args:
        settings: as from `read` or `layered`.
        prefix: what an error's message starts with.

    Raises:
        ConfigError: a value is out of range, or two don't fit each other.
    """
    whole: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        if table := _table_of(key):
            options = sections["model"].setdefault(_field(table), {})
            options[key.removeprefix(table)] = value
        elif field:
            sections[section][field] = value
        else:
            whole[key] = value
    try:
        if "vocab_size" not in sections["model"]:
            tokenizer = whole.get("tokenizer", _default("tokenizer"))
            sections["model"]["vocab_size"] = tokenizer_size(tokenizer)
        made = {name: kind(**sections[name]) for name, kind in SECTIONS.items()}
        return RunConfig(**whole, **made)
    except ConfigError as error:
        raise type(error)(f"{prefix}{error}") from error


def tokenizer_size(name: str) -> int:
    """Tokens of a tokenizer, from its name; only one that is given as a path is read.

    Raises:
        ConfigError: not the name of a tokenizer; the nearest is offered.
        DataError: the path holds no tokenizer.
    """
    from polyak.data.tokenizer_names import GPT2, GPT2_SIZE, parse_name

    known = parse_name(name)
    if known.size is not None:
        return known.size
    return GPT2_SIZE if name == GPT2 else known.load().vocab_size


def typed(key: str, value: Any) -> Any:
    """A value from TOML for a dotted key, as the field's type.

    Raises:
        UnknownNameError: there is no such key; the nearest is offered.
        ConfigError: the value is of another type.
    """
    return value if _table_of(key) else convert(value, _kind(key, value), key)


def from_text(key: str, text: str) -> Any:
    """`typed`, for a value that is written as on the command line."""
    return parse_free(text) if _table_of(key) else parse(text, _kind(key, text), key)


def _table_of(key: str) -> str | None:
    """Which of `OPTIONS` a key names an option in."""
    return next((t for t in OPTIONS if key.startswith(t) and len(key) > len(t)), None)


def _field(table: str) -> str:
    return table.removeprefix("model.").rstrip(".")


def _kind(key: str, value: Any) -> Any:
    kinds = _kinds()
    if key in SECTIONS or f"{key}." in OPTIONS:
        raise ConfigError(f"{key}={value!r}: {key} is a table; set its fields, {key}.FIELD")
    if key not in kinds:
        raise _unknown_key(key, kinds)
    return kinds[key]


def _read(name_or_path: str, beside: Path, chain: tuple[str, ...]) -> Settings:
    path = Path(name_or_path).expanduser()
    own = path.suffix != ".toml" and "/" not in name_or_path and os.sep not in name_or_path
    source: Any
    if own:
        if name_or_path not in names():
            hint = f"; a file of your own needs the ending .toml, or ./{name_or_path}"
            raise UnknownNameError(
                f"{unknown('recipe', name_or_path, names())}{hint if os.path.exists(path) else ''}"
            )
        source, identity = (
            files("polyak.training.config") / "recipe_files" / f"{path}.toml",
            str(path),
        )
    else:
        source = beside / path
        identity = str(source.resolve())
    if identity in chain:
        circle = " → ".join(Path(step).name for step in (*chain[chain.index(identity) :], identity))
        raise ConfigError(f"recipe {name_or_path}: it derives from itself ({circle})")
    try:
        content = tomllib.loads(source.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UnknownNameError(f"recipe {source}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"recipe {source}: cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ConfigError(f"recipe {source}: its lists and tables are nested too deep") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"recipe {source}: not TOML: {error}") from error
    base = content.pop("base", None)
    try:
        settings = _flat(content)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"base={base!r} must be text: a recipe's name or a path")
    except ConfigError as error:
        raise type(error)(f"recipe {name_or_path}: {error}") from error
    if base is None:
        return layered({}, settings)
    try:
        below = _read(base, Path() if own else source.parent, (*chain, identity))
    except ConfigError as error:
        raise type(error)(f"recipe {name_or_path}: base: {error}") from error
    return layered(below, settings)


def layered(below: Settings, settings: Settings) -> Settings:
    """`settings` over those below them; `model.preset` becomes the fields it sets.

    They win over the fields below, and those set beside the preset win over it. What is below and
    speaks of a rule's or attention's own parts goes where another comes.
    """
    above = dict(settings)
    preset = above.pop(PRESET, None)
    if preset is not None:
        heads = {**below, **above}.get("model.num_heads", ModelConfig().num_heads)
        fields = {f"model.{name}": value for name, value in preset_fields(preset, heads).items()}
        rule = {"model.rule": RULES[preset]} if preset in RULES else {}
        above = {**rule, **fields, **above}
    return {**_without_other_pieces(below, above), **above}


def _without_other_pieces(below: Settings, above: Settings) -> Settings:
    kept = dict(below)
    own = {"model.rule": (FREE, "model.stream_start"), "model.attention": (ATTENTION,)}
    for axis, parts in own.items():
        if above.get(axis, below.get(axis)) != below.get(axis):
            kept = {key: value for key, value in kept.items() if not key.startswith(parts)}
    return kept


def _flat(content: Mapping[str, Any]) -> Settings:
    settings: Settings = {}
    for name, value in content.items():
        if name in SECTIONS:
            if not isinstance(value, dict):
                raise ConfigError(f"{name}={value!r} must be a table, [{name}]")
            for field, inside in value.items():
                table = f"{name}.{field}."
                if table in OPTIONS and isinstance(inside, dict):
                    settings |= {f"{table}{option}": given for option, given in inside.items()}
                else:
                    settings[f"{name}.{field}"] = typed(f"{name}.{field}", inside)
        elif isinstance(value, dict) and name not in _kinds():
            raise unknown("table", name, SECTIONS)
        else:
            settings[name] = typed(name, value)
    return settings


def _kinds() -> dict[str, Any]:
    """Every key that a recipe or `--set` may name → its type."""
    kinds = dict(typing.get_type_hints(RunConfig))
    for name, section in SECTIONS.items():
        del kinds[name]
        kinds |= {f"{name}.{key}": kind for key, kind in typing.get_type_hints(section).items()}
    kinds[PRESET] = Preset
    return kinds


def _unknown_key(key: str, known: Mapping[str, Any]) -> UnknownNameError:
    """Offers the nearest key: in the same section, else by its last part anywhere."""
    section, _, field = key.rpartition(".")
    by_field: dict[str, list[str]] = {}
    for candidate in known:
        by_field.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    here = [candidate for candidate in known if candidate.rpartition(".")[0] == section]
    nearest = (
        by_field.get(field, [])
        or difflib.get_close_matches(key, here, n=1, cutoff=0.7)
        or by_field.get(next(iter(difflib.get_close_matches(field, by_field, n=1)), ""), [])
        or difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    )
    if nearest:
        return UnknownNameError(f"unknown key {key!r}; did you mean {nearest[0]!r}?")
    return unknown("key", key, here or known)


def _default(field: str) -> Any:
    return next(f.default for f in dataclasses.fields(RunConfig) if f.name == field)
