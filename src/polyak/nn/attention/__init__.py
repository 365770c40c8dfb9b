"""Kinds of attention: one file a kind, found as update rules are (`polyak.registry`).

`names()` lists the kinds, `get(name)` returns a kind's class, `register` adds one. Nothing here
imports torch until a kind is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from polyak.errors import AttentionError
from polyak.registry import Registry

if TYPE_CHECKING:
    from polyak.nn.attention._base import Attention

Kind = TypeVar("Kind", bound="type[Attention]")

__all__ = ["Attention", "get", "names", "register"]


def _root() -> type[Attention]:
    from polyak.nn.attention._base import Attention

    return Attention


KINDS = Registry(
    "attention", "polyak.nn.attention", "polyak.attention", _root, AttentionError, first="softmax"
)
names, get = KINDS.names, KINDS.get


def register(name: str) -> Callable[[Kind], Kind]:
    """Class decorator that makes a kind of attention available everywhere under `name`.

    Raises:
        AttentionError: the name is malformed or belongs to another kind already.
    """

    def decorate(kind: Kind) -> Kind:
        KINDS.add(name, kind)
        kind.name = name
        return kind

    return decorate


def __getattr__(name: str) -> Any:
    if name == "Attention":
        return _root()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
