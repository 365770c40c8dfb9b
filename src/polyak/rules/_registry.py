"""The registry of update rules; `polyak.registry` says how a rule can be named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from polyak.errors import RuleError
from polyak.registry import Registry

if TYPE_CHECKING:
    from polyak.rules._base import UpdateRule

Rule = TypeVar("Rule", bound="type[UpdateRule]")


def _root() -> type[UpdateRule]:
    from polyak.rules._base import UpdateRule

    return UpdateRule


RULES = Registry("rule", "polyak.rules", "polyak.rules", _root, RuleError, first="gradient_descent")
names, get = RULES.names, RULES.get


def register(name: str, *, architecture: str = "", paper: str = "") -> Callable[[Rule], Rule]:
    """Class decorator that makes a rule available everywhere under `name`.

    Args:
        name: what users type, for example `"triple_momentum"`; letters, digits, `_` and `-`.
        architecture: the name its paper gives the resulting Transformer, if any.
        paper: where the rule comes from, for example `"arXiv:2605.24425"`.

    Raises:
        RuleError: the name is malformed or belongs to another rule already.
    """

    def decorate(rule: Rule) -> Rule:
        RULES.add(name, rule)
        rule.name, rule.architecture, rule.paper = name, architecture, paper
        return rule

    return decorate
