"""A process that encodes chunks of text for `encode.Encoder`: from standard input to output."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from polyak.data.encode import encode, send
from polyak.data.tokenizer_names import load_tokenizer
from polyak.errors import PolyakError
from polyak.signals import leave_to_parent


def main() -> None:
    """Encode until the input ends: `FOLDER-OF-THE-TOKENIZER SIDES`.

    The process that started this one handles signals; when it is gone, the input ends.
    """
    leave_to_parent()
    try:
        tokenizer, sides = load_tokenizer(Path(sys.argv[1])), int(sys.argv[2])
    except PolyakError as problem:  # the folder is gone with the process that started this one
        sys.exit(f"polyak worker: {problem}")
    source, target = sys.stdin.buffer, sys.stdout.buffer
    try:
        while True:
            send(target, encode(tokenizer, pickle.load(source), sides))
    except (BrokenPipeError, EOFError, pickle.UnpicklingError):
        os._exit(0)  # the process that started this one is done, or gone
