"""Where the pieces of an axis are found: a package's files, `register`, entry points, users' files.

A piece (a rule, a kind of attention) can be named in four ways:

- `"triple_momentum"`: a piece of this package, of its own file name;
- a name that a user's code passed to `register`, or that an installed package offers in the
  axis's entry-point group, `polyak.rules` for example;
- `"path/to/my_rule.py:MyRule"`: a class in a file;
- `"my_package.my_module:MyRule"`: a class in an importable module.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from polyak import usercode
from polyak.errors import PolyakError, nearest, unknown

Piece = TypeVar("Piece", bound=type)


class Registry(Generic[Piece]):
    """The pieces of one axis, by name.

    Args:
        kind: what a piece is called in messages, `"rule"`.
        package: where its own files are, one piece each, `"polyak.rules"`.
        group: the entry-point group in which installed packages offer theirs.
        base: gives the class that every piece derives from; called when a piece is looked up, so
            that listing names imports nothing.
        error: what is raised for a piece that cannot be had.
        first: the name that is listed before the others, which are in alphabetical order.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        group: str,
        base: Callable[[], Piece],
        error: type[PolyakError],
        first: str,
    ) -> None:
        self.kind, self.package, self.group = kind, package, group
        self.error, self.first, self._base = error, first, base
        self._registered: dict[str, Piece] = {}

    def add(self, name: str, piece: Piece) -> None:
        """Make a piece available under `name`: letters, digits, `_` and `-`.

        Raises:
            PolyakError: the name is malformed or belongs to another piece already.
        """
        self._check_name(name)
        known = self._registered.get(name)
        same = known is not None and known.__qualname__ == piece.__qualname__
        foreign = name in self.own_names and piece.__module__ != f"{self.package}.{name}"
        if (known is not None and not same) or (known is None and foreign):
            raise self.error(
                f"{self.kind} name {name!r} is taken; register {piece.__name__} under another"
            )
        self._registered[name] = piece

    def _check_name(self, name: str) -> None:
        if not name.replace("_", "").replace("-", "").isalnum():
            raise self.error(f"{self.kind} name {name!r}: use letters, digits, '_' and '-' only")

    def names(self) -> tuple[str, ...]:
        """All names: the first, then the others in alphabetical order."""
        found = {*self.own_names, *self._entry_points, *self._registered}
        return tuple(sorted(found, key=lambda name: (name != self.first, name)))

    def get(self, name: str) -> Piece:
        """The class called `name` (see the module's docstring for the forms of a name).

        Raises:
            UnknownNameError: there is none; the nearest name is offered.
            PolyakError: a user's file does not import or does not define the class.
        """
        if ":" in name:
            source, _, class_name = name.rpartition(":")
            module = self._load_file(source) if _is_file(source) else self._module(source, name)
            return self._class_of(module, class_name, source)
        if name not in self._registered and name in self.own_names:
            importlib.import_module(f"{self.package}.{name}")
        if name not in self._registered and name in self._entry_points:
            return self._from_entry_point(name)
        if name not in self._registered:
            raise unknown(self.kind, name, self.names())
        return self._registered[name]

    def brings_code(self, name: str) -> bool:
        """Whether looking a name up may run code that neither this package nor the process has."""
        return ":" in name or (
            name not in self.own_names
            and name not in self._registered
            and name in self._entry_points
        )

    @cached_property
    def own_names(self) -> frozenset[str]:
        """Names of the pieces that come with this package."""
        modules = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return frozenset(module.name for module in modules if not module.name.startswith("_"))

    @cached_property
    def _entry_points(self) -> dict[str, str]:
        from importlib.metadata import distributions, entry_points

        try:
            points = list(entry_points(group=self.group))
        except Exception:  # one package's metadata cannot be read: the others' can
            points = []
            for package in distributions():
                try:
                    points += package.entry_points.select(group=self.group)
                except Exception as error:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    warnings.warn(
                        f"entry points of the installed package {package.name!r} cannot be "
                        f"read: {reason}",
                        stacklevel=2,
                    )
        return {point.name: point.value for point in points}

    def _from_entry_point(self, name: str) -> Piece:
        self._check_name(name)
        source, _, class_name = self._entry_points[name].partition(":")
        piece = self._class_of(self._module(source, name), class_name, source)
        if name not in self._registered:  # the module need not call `register` itself
            piece.name = name  # type: ignore[attr-defined]  # every base has one
        return self._registered.setdefault(name, piece)

    def _module(self, source: str, name: str) -> ModuleType:
        try:
            return importlib.import_module(source)
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            raise self.error(
                f"{self.kind} {name!r}: module {source!r} does not import: {error}"
            ) from error

    def _load_file(self, source: str) -> ModuleType:
        path = Path(source).expanduser().resolve()
        if path.suffix != ".py" and path.is_file():
            raise self.error(
                f"{self.kind} file {str(path)!r} is not a Python file; its name must end in .py"
            )
        try:
            code = usercode.read(path, error=self.error)
        except PolyakError as error:
            raise self.error(f"{self.kind} {error}") from error
        try:
            return usercode.load(code)
        except (Exception, SystemExit) as failure:  # a user's file may raise anything
            reason = f"{type(failure).__name__}: {failure}"
            raise self.error(
                f"{self.kind} file {str(path)!r} does not import: {reason}"
            ) from failure

    def _class_of(self, module: ModuleType, class_name: str, source: str) -> Piece:
        base, piece = self._base(), getattr(module, class_name, None)
        if piece is None:
            classes = [
                name
                for name, value in vars(module).items()
                if isinstance(value, type) and issubclass(value, base) and value is not base
            ]
            hint = nearest(class_name, classes)
            hint = hint or f" (it defines: {', '.join(classes) or f'no {self.kind}s'})"
            raise self.error(f"{self.kind} file {source!r} does not define {class_name!r}{hint}")
        if not (isinstance(piece, type) and issubclass(piece, base)):
            public = f"{self.package}.{base.__name__}"
            raise self.error(f"{source}:{class_name} is not a subclass of {public}")
        return piece  # type: ignore[return-value]  # checked just now


def source_of(name: str) -> Path | None:
    """The file a `path.py:Class` name points to, or None for every other form."""
    source, _, _ = name.rpartition(":")
    return Path(source).resolve() if source and _is_file(source) else None


def _is_file(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source
