"""Models: configuration, oracles, splittings, the Transformer, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyak.nn.config import ModelConfig

if TYPE_CHECKING:
    from polyak.nn.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]


def __getattr__(name: str) -> Any:
    if name == "Transformer":  # imports torch
        from polyak.nn.transformer import Transformer

        return Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
