"""Transformers whose layers are optimizer steps.

    from polyak import ModelConfig, Transformer
    model = Transformer(ModelConfig(rule="triple_momentum"))
    logits = model(input_ids)  # (B, T) → (B, T, vocab)

Importing polyak does not import torch; using `Transformer` or `load_run` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyak.errors import PolyakError
from polyak.nn.config import ModelConfig
from polyak.version import __version__

if TYPE_CHECKING:
    from polyak.nn.transformer import Transformer
    from polyak.training.runs.folder import load_run


__all__ = ["ModelConfig", "PolyakError", "Transformer", "__version__", "load_run"]


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from polyak.nn.transformer import Transformer

        return Transformer
    if name == "load_run":
        from polyak.training.runs.folder import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
