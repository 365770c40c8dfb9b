"""The conformance vectors' weights, for tests that pass them through files."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "conformance"
VECTORS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def weights(name: str) -> dict[str, Tensor]:
    """Under their released names."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}


def about(name: str) -> dict[str, str]:
    """Rule, heads, velocity start."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        found: dict[str, str] = file.metadata()
    return found
