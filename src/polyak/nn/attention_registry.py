"""Where kinds of attention are found by name. Apart from the kinds, as `ModelConfig` looks here."""

from __future__ import annotations

import importlib
from typing import Any

from polyak.errors import AttentionError
from polyak.registry import Registry


def _root() -> Any:
    # by name, as every kind is imported: a kind is made from a configuration
    return importlib.import_module("polyak.nn.attention._base").Attention


KINDS: Registry[Any] = Registry(
    "attention", "polyak.nn.attention", "polyak.attention", _root, AttentionError, first="softmax"
)
