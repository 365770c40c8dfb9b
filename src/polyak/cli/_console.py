"""The terminal: names and texts of files, and of models, are shown there without what it obeys."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich import console
from rich.segment import Segment

from polyak.errors import plain


class Console(console.Console):
    """rich's, whose texts and tables have control characters written out."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """The segments of anything that can be printed; styles are rich's own and stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text, "\n"))


def show(text: str, *, end: str = "\n", flush: bool = False) -> None:
    """Print a text: as it is into a file or pipe, and to a terminal without control characters."""
    print(plain(text, "\n\t") if sys.stdout.isatty() else text, end=end, flush=flush)
