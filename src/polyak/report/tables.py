"""Text tables in the package's style, for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text


class _Headed(Table):
    """A table below a line of text that may be wider than it: rich folds a title to the table."""

    heading = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading:
            yield Text(self.heading, style="table.title")
        if self.__rich_measure__(console, options.update(max_width=10_000)).maximum > (
            options.max_width
        ):
            yield from self._stacked()
        else:
            yield from super().__rich_console__(console, options)

    def _stacked(self) -> Iterator[Text]:
        """Row below row, a line for each cell: no number is cut where there is no room."""
        first, *rest = self.columns
        headers = [_words(column.header) for column in rest]
        for place, name in enumerate(first.cells):
            yield Text(_words(name, joined=""))
            for header, column in zip(headers, rest, strict=True):
                cell = _words(list(column.cells)[place])
                if cell:
                    yield Text(f"  {header}: {cell}" if header else f"  {cell}")
        if self.caption:
            yield Text(str(self.caption))


def _words(cell: RenderableType, joined: str = " ") -> str:
    """A cell in one line."""
    text = cell.plain if isinstance(cell, Text) else str(cell)
    return joined.join(text.split("\n"))


def house_table(title: str, *columns: str) -> Table:
    """A table in the package's style: names to the left, numbers to the right."""
    table = _Headed(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.heading = title
    table.add_column(columns[0], no_wrap=True)  # folded already, where it means something
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def as_text(shown: RenderableType, width: int = 80) -> str:
    """Anything rich prints as plain text, every line at most `width` columns."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(shown)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
