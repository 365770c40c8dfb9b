"""Kinds of attention: one file a kind, found as update rules are (`polyak.registry`).

`names()` lists the kinds, `get(name)` returns a kind's class, `register` adds one. A kind declares
its options with `choice`, `flag`, `number`, `positive`, `unit` and `whole`. Nothing here imports
torch until a kind is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from polyak.nn.attention._options import choice, flag, number, positive, unit, whole
from polyak.nn.attention_registry import KINDS

if TYPE_CHECKING:
    from polyak.nn.attention._base import Attention

Kind = TypeVar("Kind", bound="type[Attention]")

__all__ = [
    "Attention",
    "choice",
    "flag",
    "get",
    "names",
    "number",
    "positive",
    "register",
    "unit",
    "whole",
]


names = KINDS.names


def get(name: str) -> type[Attention]:
    """The kind called `name`, in one of the forms of `polyak.registry`.

    Raises:
        UnknownNameError: there is none; the nearest name is offered.
        AttentionError: a user's file does not import or does not define the class.
    """
    kind: type[Attention] = KINDS.get(name)
    return kind


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
        from polyak.nn.attention._base import Attention

        return Attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
