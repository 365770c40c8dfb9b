"""Errors that are the user's to fix: each is one line naming the field, the value and the fix.

The command line prints them without a traceback; code that calls polyak can catch
`PolyakError`, or `ValueError` where the mistake is a bad value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_LINE = 1500
"""Characters of an error's text; of a longer one the beginning and the end are kept."""


class PolyakError(Exception):
    """Base of every error a user can cause and fix: one line, whatever a file or library said."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*(_one_line(part) if isinstance(part, str) else part for part in parts))


class ConfigError(PolyakError, ValueError):
    """A configuration field has a value that cannot work."""


class UnknownNameError(ConfigError, KeyError):
    """A name (rule, corpus, option, field) that is not known; the message offers the nearest."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class RuleError(PolyakError):
    """A rule that does not load, does not define what a rule must, or misuses its declarations."""


class AttentionError(PolyakError):
    """A kind of attention that does not load, or does not define what a kind must."""


class DataError(PolyakError):
    """A corpus, tokenizer or token shard that is missing, empty, binary, too short or corrupt."""


class RunError(PolyakError):
    """A run folder that is missing, unwritable, corrupt, or made with other settings."""


class TrustError(RunError):
    """Code that comes with data and was not made here, without the user's word for it."""


class UnwritableError(RunError):
    """A file or folder that cannot be written: a full disk, or no permission."""


class DivergedError(PolyakError):
    """A loss or gradient stopped being finite; the message names the step and the rule."""


class StoppedError(PolyakError):
    """Training was asked to stop by a signal; everything up to that step is in a checkpoint."""


class MissingExtraError(PolyakError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")


def _one_line(text: str) -> str:
    text = " ".join(part.strip() for part in _BREAKS.split(text) if part.strip())
    if len(text) <= LONGEST_LINE:
        return text
    return f"{text[: LONGEST_LINE - 300]} … {text[-297:]}"


_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, those that turn the direction of text, and unpaired surrogates."""


def plain(text: str, keep: str = "") -> str:
    """Text as a terminal may get it: control characters are written as `\\x1b`.

    Args:
        text: of a file, a name or a model.
        keep: characters that stay, as line breaks of a text that has lines.
    """

    def escaped(found: re.Match[str]) -> str:
        sign = found[0]
        code = ord(sign)
        return sign if sign in keep else f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _UNSEEN.sub(escaped, text)


def shown_value(value: object, longest: int = 80) -> str:
    """A value in a message: its beginning, on one line."""
    if isinstance(value, str):
        value = value[: longest + 1]
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return "a whole number of more than 60 digits"
    elif isinstance(value, list | tuple | dict):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    whole = plain(repr(value))
    return whole if len(whole) <= longest else f"{whole[:longest]}…"


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'adam'?"` for the closest known name, or `""` if nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown name: offers the nearest and lists what exists."""
    known = list(known)
    shown = shown_value(name, 200)
    return UnknownNameError(
        f"unknown {kind} {shown}{nearest(name[:200], known)} (known: {', '.join(sorted(known))})"
    )
