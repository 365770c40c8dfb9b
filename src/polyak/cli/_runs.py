"""What the commands that look into trained runs share: the option RUN, and their course."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyak.errors import ConfigError

if TYPE_CHECKING:
    from polyak.cli._bars import Bar
    from polyak.cli._console import Console

RunPaths = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
]
"""Finished runs, comparisons, or folders of runs."""


def check_named(runs: tuple[Path, ...], usage: str) -> None:
    """See that a run is named.

    Raises:
        ConfigError: none is; the message shows `usage`.
    """
    if not runs:
        raise ConfigError(f"no run is named; write polyak {usage}")


def look(
    command: str,
    words: Sequence[str],
    out: Path,
    measure: Callable[[str, Bar, Console], dict[str, Any]],
    tables: Callable[[dict[str, Any]], Any],
) -> int:
    """Measure with a bar, print the tables, and say where the page is.

    Args:
        command: `"sharpness"`; with `words` the command line that repeats it.
        words: its options.
        out: where the page goes.
        measure: called with the command line, the bar and the console; gives the results.
        tables: what is printed of them.
    """
    from polyak.cli._bars import Bar
    from polyak.cli._console import Console

    line = shlex.join(["polyak", *command.split(), *words])
    console = Console(highlight=False)
    with Bar(console) as bar:
        results = measure(line, bar, console)
    console.print(tables(results), width=80)
    console.say(f"Report: {out / 'report.html'}")
    return 0
