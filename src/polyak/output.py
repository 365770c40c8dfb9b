"""Standard output and error that work outlasts: what cannot be printed is dropped.

A reader that went away (`polyak train | head`), a terminal that was closed or a full disk behind
`> log.txt` must not end hours of work, whose result is in files. Commands whose result is what
they print are told instead.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap
from typing import TextIO

from polyak.errors import UnwritableError, plain


class ReaderGoneError(Exception):
    """The reader, `head` for example, has seen enough; not a BrokenPipeError, which rich takes."""


class Lasting(io.RawIOBase):
    """Writes to a file descriptor until that fails, and drops what comes after.

    Args:
        descriptor: where to; never closed here.
        lasting: False: an error is raised, for a command that only prints.

    Raises:
        ReaderGoneError: nobody reads, and not `lasting`.
        UnwritableError: of another failure, and not `lasting`.
    """

    def __init__(self, descriptor: int, *, lasting: bool) -> None:
        self.descriptor, self.lasting, self.gone = descriptor, lasting, False

    def write(self, content: object) -> int:
        """All of it, or as much as can be written: the rest counts as written, too."""
        left = memoryview(content).cast("B")  # type: ignore[arg-type]
        size = len(left)
        while left and not self.gone:
            try:
                left = left[os.write(self.descriptor, left) :]
            except BlockingIOError:  # a full pipe that does not wait
                break
            except OSError as problem:
                self.gone = True
                if self.lasting:
                    break
                if isinstance(problem, BrokenPipeError):
                    raise ReaderGoneError from problem
                raise UnwritableError(f"cannot print: {problem.strerror}") from problem
        return size

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.descriptor)


def show(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print a text: as it is into a file or pipe, and to a terminal without control characters."""
    print(plain(text, "\n\t") if sys.stdout.isatty() else text, end=end, flush=flush)


def say(line: str, *, indent: int = 0) -> None:
    """`show` for what is one line, whatever the names in it hold.

    Args:
        line: a terminal that is narrower gets it broken between words.
        indent: columns before what follows such a break.
    """
    print(_in_width(plain(line), sys.stdout, indent) if sys.stdout.isatty() else line)


def tell(text: str = "") -> None:
    """Print a line on standard error, without control characters wherever that leads."""
    print(_in_width(plain(text), sys.stderr), file=sys.stderr, flush=True)


def _in_width(line: str, stream: TextIO, indent: int = 0) -> str:
    """A line as its terminal is wide; as it is elsewhere, for other programs."""
    if not stream.isatty():
        return line
    with contextlib.suppress(OSError, ValueError):
        columns = os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns
        return in_lines(line, int(columns), indent)
    return line


def in_lines(line: str, width: int, indent: int = 0) -> str:
    """A line broken between words, and never inside one: paths and names can be copied."""
    if len(line) <= width or width < 1:
        return line
    return textwrap.fill(
        *(line, width),
        subsequent_indent=" " * min(indent, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def outlast(*, lasting: bool = True) -> None:
    """Put `Lasting` streams in the place of this process's standard output and error.

    A descriptor that was closed (`>&-`) leads nowhere from now on; else the next file to be
    opened, a checkpoint for example, would get its number and whatever is printed to it. Streams
    that something else has put in their place, as tests do, are left alone.

    Args:
        lasting: for standard output; standard error always is.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name, lasts in (("stdout", lasting), ("stderr", True)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            raw = Lasting(stream.fileno(), lasting=lasts)
            setattr(
                sys,
                name,
                io.TextIOWrapper(
                    io.BufferedWriter(raw),
                    encoding=stream.encoding,
                    errors="replace",  # Greek letters where the encoding has none
                    line_buffering=name == "stderr" or raw.isatty(),
                ),
            )
