"""The encoding of text files, by name."""

from __future__ import annotations

import codecs

from polyak.errors import ConfigError

DEFAULT = "utf-8"
_NOT_OF_FILES = {"unicode-escape", "raw-unicode-escape", "utf-7", "punycode", "idna", "undefined"}


def check_encoding(name: str) -> str:
    """The name that Python has for an encoding: `latin-1` is `iso8859-1`.

    Raises:
        ConfigError: there is none of that name, or it is none of text files.
    """
    try:
        found = codecs.lookup(name)
        known = found._is_text_encoding and found.name.replace("_", "-") not in _NOT_OF_FILES
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        known = False
    if not known:
        raise ConfigError(
            f"encoding={name!r} is no encoding of text files; write utf-8, latin-1, cp1252, "
            "utf-16, shift_jis, or another that Python has"
        )
    return found.name


def decoding(name: str) -> str:
    """The codec to read with: of UTF-8, the one that leaves a byte-order mark out."""
    return "utf-8-sig" if check_encoding(name) == DEFAULT else name


def holds_bytes(name: str) -> bool:
    """Whether a byte of ASCII stands for itself in it, so that lines end where one does."""
    return "\n{0".encode(name) == b"\n{0"
