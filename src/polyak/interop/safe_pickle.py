"""Files of `torch.save`, read so that nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from polyak.errors import RunError


def load_pickle(file: Path) -> Any:
    """What `torch.save` wrote: tensors, numbers, text and containers of them, on the CPU.

    Raises:
        RunError: missing, cut short, something else, or holding code instead of weights.
    """
    try:
        handle = file.open("rb")
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        with handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle that is refused in a moment
            return torch.load(handle, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = " ".join(str(error).split())
        if "Unsupported" in text or "GLOBAL" in text:
            raise RunError(
                f"{file} holds more than weights{_named(text)}: loading it would run code, so it "
                "is refused; save its state dict alone"
            ) from error
        raise RunError(f"{file} is not a file of torch.save") from error
    except Exception as error:  # a damaged archive raises nearly anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise RunError(f"{file} is damaged, or not a file of torch.save: {reason}") from error


def _named(message: str) -> str:
    """What a refused pickle asks for, where torch's message tells."""
    found = re.search(r"GLOBAL (\S+)", message)
    return f" ({found[1]})" if found else ""
