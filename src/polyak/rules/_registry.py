"""Where rules are found: this package's files, `register`, entry points, and users' files.

A rule can be named in four ways:

- `"triple_momentum"`: a rule of this package, of its own file name;
- a name that a user's code passed to `register`, or that an installed package offers in the
  entry-point group `polyak.rules`;
- `"path/to/my_rule.py:MyRule"`: a class in a file;
- `"my_package.my_module:MyRule"`: a class in an importable module.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from polyak.errors import RuleError, nearest, unknown

if TYPE_CHECKING:
    from polyak.rules._base import UpdateRule

Rule = TypeVar("Rule", bound="type[UpdateRule]")

_registered: dict[str, type[UpdateRule]] = {}


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
        if not name.replace("_", "").replace("-", "").isalnum():
            raise RuleError(f"rule name {name!r}: use letters, digits, '_' and '-' only")
        known = _registered.get(name)
        same = known is not None and known.__qualname__ == rule.__qualname__
        if (known is not None and not same) or (known is None and _is_builtin(name, rule)):
            raise RuleError(f"rule name {name!r} is taken; register {rule.__name__} under another")
        rule.name, rule.architecture, rule.paper = name, architecture, paper
        _registered[name] = rule
        return rule

    return decorate


def names() -> tuple[str, ...]:
    """Names of all registered rules: gradient_descent first, then in alphabetical order."""
    found = {*_builtin_names(), *_entry_points(), *_registered}
    return tuple(sorted(found, key=lambda name: (name != "gradient_descent", name)))


def get(name: str) -> type[UpdateRule]:
    """The class of the rule called `name` (see the module's docstring for the forms of a name).

    Raises:
        UnknownNameError: no such rule; the nearest name is offered.
        RuleError: a user's file does not import or does not define the class.
    """
    if ":" in name:
        source, _, class_name = name.rpartition(":")
        module = _load_file(source) if _is_file(source) else _load_module(source, name)
        return _class_of(module, class_name, source)
    if name not in _registered and name in _builtin_names():
        importlib.import_module(f"polyak.rules.{name}")
    if name not in _registered and name in _entry_points():
        return _from_entry_point(name)
    if name not in _registered:
        raise unknown("rule", name, names())
    return _registered[name]


def source_of(name: str) -> Path | None:
    """The file a `path.py:Class` name points to, or None for every other form."""
    source, _, _ = name.rpartition(":")
    return Path(source).resolve() if source and _is_file(source) else None


def _is_file(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source


@cache
def _builtin_names() -> frozenset[str]:
    package = importlib.import_module("polyak.rules")
    modules = pkgutil.iter_modules(package.__path__)
    return frozenset(module.name for module in modules if not module.name.startswith("_"))


def _is_builtin(name: str, rule: type[UpdateRule]) -> bool:
    return name in _builtin_names() and rule.__module__ != f"polyak.rules.{name}"


@cache
def _entry_points() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group="polyak.rules")}


def _from_entry_point(name: str) -> type[UpdateRule]:
    source, _, class_name = _entry_points()[name].partition(":")
    rule = _class_of(_load_module(source, name), class_name, source)
    if name not in _registered:  # the module need not call `register` itself
        rule.name = name
    return _registered.setdefault(name, rule)


def _load_module(source: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:  # a user's module may raise anything
        raise RuleError(f"rule {name!r}: module {source!r} does not import: {error}") from error


def _load_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise RuleError(f"rule file {source!r} does not exist; give path/to/file.py:ClassName")
    return _load_version(path, hashlib.sha256(path.read_bytes()).hexdigest())


@cache
def _load_version(path: Path, content: str) -> ModuleType:
    # keyed by the content, so that an edited file is read anew within one process
    module_name = f"polyak_user_rule_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RuleError(f"rule file {str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        kind = type(error).__name__
        raise RuleError(f"rule file {str(path)!r} does not import: {kind}: {error}") from error
    return module


def _class_of(module: ModuleType, class_name: str, source: str) -> type[UpdateRule]:
    from polyak.rules._base import UpdateRule

    rule = getattr(module, class_name, None)
    if rule is None:
        classes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, UpdateRule) and value is not UpdateRule
        ]
        hint = nearest(class_name, classes) or f" (it defines: {', '.join(classes) or 'no rules'})"
        raise RuleError(f"rule file {source!r} does not define {class_name!r}{hint}")
    if not (isinstance(rule, type) and issubclass(rule, UpdateRule)):
        raise RuleError(f"{source}:{class_name} is not a subclass of polyak.rules.UpdateRule")
    return rule
