"""Files of `torch.save`, read so that nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
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
        _check_sizes(file)
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        with handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle that is refused in a moment
            content = torch.load(handle, map_location="cpu", weights_only=True)
        _check_tensors(content, file)
        return content
    except RunError:
        raise
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


def _check_sizes(file: Path) -> None:
    """Refuse an archive that unpacks to more than it is: torch.save never compresses."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch says what is wrong
    if unpacked > file.stat().st_size:
        raise RunError(f"{file} unpacks to more than it holds; torch.save does not compress")


def _check_tensors(content: Any, file: Path) -> None:
    """Refuse tensors that stand for more numbers than are stored, as one expanded to a billion."""
    parts = list(content.items()) if isinstance(content, Mapping) else []
    for _, inner in list(parts):
        parts += inner.items() if isinstance(inner, Mapping) else []
    for name, value in parts:
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            stored = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > stored or value.is_meta:
                raise RunError(f"{file}: weight {name!r} is larger than what is stored of it")


def _named(message: str) -> str:
    """What a refused pickle asks for, where torch's message tells."""
    found = re.search(r"GLOBAL (\S+)", message)
    return f" ({found[1]})" if found else ""
