"""Command-line options from the configuration dataclasses, by tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, cast

from polyak.output import in_lines, tell

Config = TypeVar("Config")
COLOR = r"\x1b\[[0-9;]*m"


def parse(kind: type[Config], command: str, words: Sequence[str], description: str) -> Config:
    """Read `words` into a dataclass; its field docstrings are the help texts.

    Prints help and exits 0, or prints one line and exits 2 when an option is wrong.

    Args:
        kind: a configuration dataclass whose module imports no torch.
        command: for the usage line.
        words: the options.
        description: shown by --help, with examples.
    """
    import tyro

    if (twice := _given_twice(kind, words)) is not None:
        tell(f"polyak {command}: {twice} is given twice; leave one out")
        raise SystemExit(2)
    errors = io.StringIO()
    columns = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(words):
        os.environ["COLUMNS"] = "1000"  # so that an error is not wrapped inside its box
    try:
        narrow = cast(TextIO, _Narrow(sys.stdout))
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(narrow):
            read = tyro.cli(
                _without_none(kind),
                prog=f"polyak {command}",
                description=description,
                args=list(words),
                config=(
                    tyro.conf.UseAppendAction,
                    tyro.conf.FlagCreatePairsOff,
                    tyro.conf.DisallowNone,
                ),
                registry=_paths(),
            )
        if getattr(read, "trust_code", False):
            from polyak.trust import give_word  # here, for the sake of --help

            give_word(True)
        names = [field.name for field in dataclasses.fields(cast(Any, kind))]
        return kind(**{name: getattr(read, name) for name in names})
    except SystemExit as stop:
        if stop.code not in (0, None):
            tell(f"polyak {command}: {_one_line(errors.getvalue())}")
        raise
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _without_none(kind: type[Config]) -> type[Config]:
    """The same configuration; its help says no `(default: None)`, as the texts say what is so."""
    import tyro

    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(cast(Any, kind))
    optional = [f.name for f in fields if f.default is None]
    quiet = tyro.conf.arg(help_behavior_hint="")
    told = {
        name: hints[name] if hasattr(hints[name], "__metadata__") else Annotated[hints[name], quiet]
        for name in optional
    }
    body = {"__annotations__": told, "__doc__": kind.__doc__, "__module__": kind.__module__}
    made = type(kind.__name__, (kind,), {**body, **dict.fromkeys(told)})
    return dataclasses.dataclass(frozen=True, kw_only=True)(made)


def _paths() -> Any:
    """Paths as a shell would have them: `--out=~/x` is in the home, and `--out ""` is a mistake."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> Any:
        if info.type is not Path and set(typing.get_args(info.type)) != {Path, type(None)}:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: _path(given[0]),
            is_instance=lambda value: value is None or isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError("a path is empty (an unset variable?); write one, or . for this folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as problem:  # ~somebody who does not exist
        raise ValueError(f"{text}: {problem}") from problem


def _given_twice(kind: type, words: Sequence[str]) -> str | None:
    """The first option that stands twice in `words` and does not take several values."""
    hints = typing.get_type_hints(kind, include_extras=False)
    several = {name.replace("_", "-") for name, hint in hints.items() if _takes_several(hint)}
    seen: set[str] = set()
    for word in words:
        if word == "--":
            break
        if not word.startswith("--"):
            continue
        name = word.removeprefix("--").partition("=")[0].replace("_", "-")
        if name in seen and name not in several:
            return f"--{name}"
        seen.add(name)
    return None


def _takes_several(hint: Any) -> bool:
    parts = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    return typing.get_origin(hint) is tuple or any(map(_takes_several, parts))


class _Narrow:
    """Standard output that wraps lines wider than the terminal: tyro joins the description's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        width = shutil.get_terminal_size().columns
        lines = text.split("\n")
        for place, line in enumerate(lines):
            if len(re.sub(COLOR, "", line)) > width:
                lines[place] = in_lines(line, width, 4 if line.startswith(" ") else 0)
        return self._stream.write("\n".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _one_line(box: str) -> str:
    """The message inside tyro's error box: without the box, and without the option's help text."""
    plain = re.sub(COLOR, "", box)
    lines = [line.strip("│╭╮╰╯─┃ \t") for line in plain.splitlines()]
    # without UTF-8, tyro draws with "-"
    words = " ".join(line for line in lines if line.strip("-"))
    words = re.sub(r"\s*(Argument helptext:|For full helptext|Got errors:).*$", "", words)
    words = re.sub(r"\s*Perhaps you meant:\s*(--\S+).*$", r"; did you mean \1?", words)
    titles = r"(Value error|Parsing error|Invalid choice|Unrecognized options(?!:))"
    return re.sub(rf"^({titles}|Error parsing \w+(?:Config|Options):|\s)+", "", words)
