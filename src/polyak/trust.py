"""Whose code it is: code that comes with data runs after a word of the user's, or was made here.

What this user's runs record about code carries a message authentication code, HMAC-SHA256 with a
random key in the user's configuration folder, which no folder from elsewhere can know. The word
is `--trust-code` on the command line, `trust_code=True` or `with trusting():` in Python, and
`trust_remote_code=True` for Hugging Face's classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from polyak.files import reason

_WORD: ContextVar[bool] = ContextVar("polyak_trust_code", default=False)
KEY_BYTES = 32


@contextlib.contextmanager
def trusting(word: bool = True) -> Iterator[None]:
    """Within it, code that comes with runs and models may run; nothing changes with False."""
    token = _WORD.set(word or _WORD.get())
    try:
        yield
    finally:
        _WORD.reset(token)


def give_word(word: bool) -> None:
    """The same for the rest of a context, as a command has one of its own."""
    if word:
        _WORD.set(True)


def is_trusted() -> bool:
    """Whether the user gave the word."""
    return _WORD.get()


def config_folder() -> Path:
    """The user's configuration folder of polyak: POLYAK_CONFIG, or the platform's."""
    if given := os.environ.get("POLYAK_CONFIG"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("APPDATA") or "~/AppData/Roaming"
    elif sys.platform == "darwin":
        base = "~/Library/Application Support"
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "polyak"


def sign(*about: str | None) -> str | None:
    """The authentication code of a statement; None, with a warning, where there can be no key."""
    key = _made_key(config_folder())
    return None if key is None else _code(key, about)


def is_ours(code: object, *about: str | None) -> bool:
    """Whether `sign` gave this code to this user for this statement."""
    try:
        key = (config_folder() / "key").read_bytes()
    except OSError:
        return False
    known = isinstance(code, str) and len(key) == KEY_BYTES
    return known and hmac.compare_digest(_code(key, about).encode(), str(code).encode())


def _code(key: bytes, about: tuple[str | None, ...]) -> str:
    return hmac.new(key, json.dumps(about).encode(), hashlib.sha256).hexdigest()


def _made_key(folder: Path) -> bytes | None:
    """The user's key, drawn at its first use."""
    file = folder / "key"
    try:
        with contextlib.suppress(FileNotFoundError):
            key = file.read_bytes()
            if len(key) == KEY_BYTES:
                return key
            file.unlink()  # cut short by a kill
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = folder / f".key.{secrets.token_hex(6)}"
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(secrets.token_bytes(KEY_BYTES))
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(aside, file)
        finally:
            aside.unlink()
        return file.read_bytes()
    except OSError as problem:
        _warn_once(file, reason(problem))
        return None


@cache
def _warn_once(file: Path, why: str) -> None:
    warnings.warn(
        f"no key can be kept in {file} ({why}): what is made now with code of your own will need "
        "--trust-code to be loaded; POLYAK_CONFIG names another folder",
        stacklevel=4,
    )
