"""Update rules: one file per rule, each reading like the equation in its paper.

`names()` lists the registered rules, `get(name)` returns a rule's class, and `register`
adds one. Nothing here imports torch until a rule is looked up, so listing names is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyak.rules._registry import get, names, register

if TYPE_CHECKING:
    from polyak.rules._base import Oracle, State, Stream, UpdateRule
    from polyak.rules._declarations import (
        angle,
        choice,
        descends_at,
        positive,
        state_norm,
        unconstrained,
        unit_interval,
        update_norm,
    )
    from polyak.rules._work import Work

_LAZY = {
    "Oracle": "_base",
    "State": "_base",
    "Stream": "_base",
    "UpdateRule": "_base",
    "Work": "_work",
    "angle": "_declarations",
    "choice": "_declarations",
    "descends_at": "_declarations",
    "positive": "_declarations",
    "state_norm": "_declarations",
    "unconstrained": "_declarations",
    "unit_interval": "_declarations",
    "update_norm": "_declarations",
}

__all__ = [
    "Oracle",
    "State",
    "Stream",
    "UpdateRule",
    "Work",
    "angle",
    "choice",
    "descends_at",
    "get",
    "names",
    "positive",
    "register",
    "state_norm",
    "unconstrained",
    "unit_interval",
    "update_norm",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"polyak.rules.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
