"""The terminal: names and texts of files, and of models, are shown there without what it obeys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import console
from rich.segment import Segment

from polyak.errors import plain
from polyak.output import in_lines


class Console(console.Console):
    """rich's, whose texts and tables have control characters written out, and no markup.

    Square brackets are part of entries' names, and of what a file says.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def say(self, text: str) -> None:
        """Print a line; a terminal that is narrower gets it broken between words alone."""
        fitted = in_lines(text, self.width) if self.is_terminal else text
        self.print(fitted, soft_wrap=True, highlight=False)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """The segments of anything that can be printed; styles are rich's own and stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text, "\n"))
