"""`polyak COMMAND …`: finds the command, and turns users' mistakes into one line."""

from __future__ import annotations

import importlib
import keyword
import sys
import warnings
from collections.abc import Sequence
from contextvars import copy_context

from polyak.output import ReaderGoneError, outlast, show, tell
from polyak.signals import STOPPED, RaiseAtSignals, Stopped

COMMANDS = {
    "compare": "train rules side by side and report what differs",
    "train": "train one model by a recipe, with checkpoints and exact resume",
    "evaluate": "loss, bits per byte and perplexity of trained models on any text",
    "forgetting": "train on another corpus and measure what is forgotten",
    "generate": "continue texts with a trained model",
    "sharpness": "curvature of the loss: spectrum, trace, density, landscape",
    "spectrum": "singular values of the blocks' Jacobians and of their products",
    "dynamics": "layers as optimizer steps: loss by depth, path, energy, stability",
    "study": "whole studies on one page: factorial (a grid of options), landscape",
    "report": "draw the curves of any runs into one page",
    "rules": "print the family of update rules and what they cost",
    "prepare": "turn a corpus into token shards, ready to train on",
    "import": "take in a released checkpoint, or GPT-2 and Llama weights, as a run",
    "export": "write a run's weights as a released checkpoint",
    "upgrade": "turn a gradient_descent model into one with momentum",
    "bench": "time models and numerical kernels, interleaved",
}


PRINTS = ("rules", "generate", "bench")
"""Commands whose result is what they print, without --out: they end with their reader."""

GOES_ON = ("compare", "prepare", "sharpness", "spectrum", "dynamics", "forgetting", "study")
"""Commands that go on where they were when they are repeated."""


def usage() -> str:
    """The text of `polyak --help`."""
    lines = [
        "usage: polyak COMMAND [OPTIONS]",
        "",
        "Transformers whose layers are optimizer steps.",
        "",
        "commands:",
        *(f"  {name:<10} {what}" for name, what in COMMANDS.items()),
        "",
        "polyak COMMAND --help shows a command's options and examples.",
        "--debug shows the traceback of an error; --version the version.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0: done. 1: an error in one line on standard error. 2: the command line is wrong.
    75: stopped by SIGTERM, SIGHUP, SIGUSR1 or, in training, SIGINT. Training has saved a
    checkpoint, and goes on with --resume; other commands keep what is finished.
    130: interrupted by SIGINT; what was finished is kept.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    out = any(word == "--out" or word.startswith("--out=") for word in words)
    outlast(lasting=out or not words or words[0] not in PRINTS)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        show(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from polyak.version import __version__

        show(f"polyak {__version__}")
        return 0
    command = words.pop(0)
    if command not in COMMANDS:
        from polyak.errors import unknown

        tell(f"polyak: {unknown('command', command, COMMANDS)}")
        return 2
    return _run(command, words, debug)


def _run(command: str, words: list[str], debug: bool) -> int:
    from polyak.errors import PolyakError, StoppedError, plain

    warnings.formatwarning = lambda message, *_, **__: (
        f"polyak {command}: warning: {plain(str(message))}\n"
    )
    try:
        with RaiseAtSignals():
            # no module can be named like a keyword and be imported by a statement: `import_`
            name = f"{command}_" if keyword.iskeyword(command) else command
            module = importlib.import_module(f"polyak.cli.{name}")
            try:
                code: int = copy_context().run(module.main, words)  # a word of trust ends with it
            finally:
                sys.stdout.flush()
            return code
    except Stopped as stop:
        more = "; the same command goes on with what is done" if command in GOES_ON else ""
        tell()
        tell(f"polyak {command}: stopped by {stop.name}{more}")
        return STOPPED
    except KeyboardInterrupt:
        tell()
        tell(f"polyak {command}: interrupted")
        return 130
    except ReaderGoneError:  # the reader, `head` for example, has seen enough
        return 0
    except StoppedError as stop:
        tell(f"polyak {command}: {stop}")
        return STOPPED
    except Exception as error:
        if debug:
            raise
        kind = "" if isinstance(error, PolyakError) else f"{type(error).__name__}: "
        text = " ".join(str(error).split()) or "no message"
        hint = "" if isinstance(error, PolyakError) else " (--debug shows where)"
        tell(f"polyak {command}: {kind}{text}{hint}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
