"""Command-line options from the configuration dataclasses, by tyro."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

Config = TypeVar("Config")


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

    errors = io.StringIO()
    columns = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(words):
        os.environ["COLUMNS"] = "1000"  # so that an error is not wrapped inside its box
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                prog=f"polyak {command}",
                description=description,
                args=list(words),
                config=(tyro.conf.UseAppendAction, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code not in (0, None):
            print(f"polyak {command}: {_one_line(errors.getvalue())}", file=sys.stderr)
        raise
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _one_line(box: str) -> str:
    """The message inside tyro's error box: without the box, and without the option's help text."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯─┃ \t") for line in plain.splitlines()]
    words = " ".join(line for line in lines if line)
    words = re.sub(r"\s*(Argument helptext:|For full helptext|Got errors:).*$", "", words)
    words = re.sub(r"\s*Perhaps you meant:\s*(--\S+).*$", r"; did you mean \1?", words)
    titles = r"(Value error|Parsing error|Invalid choice|Unrecognized options(?!:))"
    return re.sub(rf"^({titles}|Error parsing \w+Config:|\s)+", "", words)
