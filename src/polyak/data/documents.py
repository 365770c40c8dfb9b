"""What a corpus is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple


class Document(NamedTuple):
    """One text with a name that is unique in its corpus and the same on every machine."""

    name: str
    text: str


def fingerprint_of(kind: str, files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over what the files are read as, their names and the SHA-256 of each content."""
    digest = sha256(json.dumps([kind]).encode())
    for name, content in files:
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()
