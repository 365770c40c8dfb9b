"""A user's file as code: its content and what it imports from its own folder, read and run as one.

The content is the identity: the same bytes at another path are the same code, and run once in a
process. Modules of two versions never meet, since each set runs under a name of its own, its
helpers included, and from memory, so that a file that is edited, moved or deleted later changes
nothing for what has been read.

What belongs to a file is found in its text: `import` statements that name a module, or a package
with all its modules, that lies beside it; then theirs. What a file imports by `importlib`, from
other folders, or reads as data, does not belong to it. A name of the standard library or of what
polyak itself is built on is never taken from the file's folder.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from polyak.errors import PolyakError
from polyak.files import reason, sha256_of

PREFIX = "polyak_code_"
NEVER = sys.stdlib_module_names | {"polyak", "torch", "numpy", "scipy", "transformers"}
MOST_FILES, MOST_BYTES = 1000, 2**24


@dataclass(frozen=True)
class UserCode:
    """A user's file and its helpers.

    Attributes:
        main: the file's name.
        files: content by path below the file's folder, with `/`; the file itself first.
        folder: where it was read.
    """

    main: str
    files: Mapping[str, bytes]
    folder: Path

    @cached_property
    def sha256(self) -> str:
        """The hash of a file on its own is its SHA-256; else one of every helper's path and hash.

        The name of the file itself does not count.
        """
        first, *others = ((path, sha256_of(content)) for path, content in self.files.items())
        if not others:
            return first[1]
        return sha256_of(json.dumps([first[1], *sorted(map(list, others))]).encode())

    @property
    def path(self) -> Path:
        """Where the file was read."""
        return self.folder / self.main

    @property
    def module_name(self) -> str:
        """Name of the package under which the set runs."""
        return PREFIX + self.sha256[:24]

    @property
    def is_loaded(self) -> bool:
        """Whether this process has run it."""
        return self.module_name in _RUNNING


def read(path: Path, *, error: type[PolyakError]) -> UserCode:
    """A file with its helpers, as they are now; a file that is gone, as it was last read here.

    Raises:
        PolyakError: there is no such file, or it cannot be read, or brings too much.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        if path in _HELD:
            return _HELD[path]
        raise error(f"file {str(path)!r} does not exist; give path/to/file.py:ClassName")
    try:
        files = _with_helpers(path)
    except OSError as problem:
        raise error(f"cannot read {path}: {reason(problem)}") from problem
    if files is None:
        raise error(
            f"{path} imports more than {MOST_FILES} files, or {MOST_BYTES >> 20} MiB, of its "
            "folder; put it where its helpers are alone"
        )
    code = _HELD.get(path)
    if code is None or code.files != files:
        code = _HELD[path] = UserCode(path.name, files, path.parent)
    return code


_HELD: dict[Path, UserCode] = {}


def _with_helpers(path: Path) -> dict[str, bytes] | None:
    """The file and what it imports from its folder; None where that is too much."""
    files: dict[str, bytes] = {}
    waiting, left = [path.name], MOST_BYTES
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        with (path.parent / name).open("rb") as handle:
            content = handle.read(left + 1)
        left -= len(content)
        if left < 0 or len(files) >= MOST_FILES:
            return None
        files[name] = content
        waiting += [found for found in _beside(path.parent, name, content) if found not in files]
    return files


def load(code: UserCode) -> ModuleType:
    """Run a file, once in a process, and return its module; what it raises is left to the caller.

    `inspect.getsource` and tracebacks show it as it was read.
    """
    name = code.module_name
    main = f"{name}.{_stem(code.main)}"
    if name in _RUNNING:
        return importlib.import_module(f"{name}.{_stem(_RUNNING[name].main)}")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    package = ModuleType(name)
    package.__path__ = []
    sys.modules[name], _RUNNING[name] = package, code
    try:
        return importlib.import_module(main)
    except BaseException:
        del _RUNNING[name]
        for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[loaded]
        raise


_RUNNING: dict[str, UserCode] = {}


def _stem(main: str) -> str:
    """A module's name for a file's: no dots."""
    return main.removesuffix(".py").replace(".", "_")


def _beside(folder: Path, name: str, content: bytes) -> Iterator[str]:
    """Paths below the folder of what one file of it imports."""
    package = PurePosixPath(name).parent.parts
    for level, parts in _imports(content):
        base = package[: len(package) - level + 1] if level else ()
        if level - 1 > len(package) or (not base and (not parts or parts[0] in NEVER)):
            continue
        top = (*base, *parts)[0]
        if (folder / f"{top}.py").is_file() and not (folder / top / "__init__.py").is_file():
            yield f"{top}.py"
        elif any((folder / top).glob("*.py")):
            inside = islice((folder / top).rglob("*.py"), MOST_FILES + 1)
            yield from sorted(file.relative_to(folder).as_posix() for file in inside)


@lru_cache(maxsize=256)
def _imports(content: bytes) -> Sequence[tuple[int, tuple[str, ...]]]:
    """(level, parts of the name) of every import; level 0 is absolute."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()  # it will not run either, which says why
    found: list[tuple[int, tuple[str, ...]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.level, tuple(node.module.split("."))))
        elif isinstance(node, ast.ImportFrom):  # from . import name
            found += [(node.level, (alias.name,)) for alias in node.names]
    return tuple(found)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of every set that runs, by the name of its package."""

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        name, _, inside = fullname.partition(".")
        code = _RUNNING.get(name)
        if code is None:
            return None
        place = inside.replace(".", "/")
        found = {f"{place}.py": False, f"{place}/__init__.py": True}
        if inside == _stem(code.main):
            found = {code.main: False}
        for file, is_package in found.items():
            if file in code.files:
                loader = _Loader(code, file)
                return importlib.machinery.ModuleSpec(
                    fullname, loader, origin=loader.path, is_package=is_package
                )
        if any(file.startswith(f"{place}/") for file in code.files):  # without an __init__.py
            return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        return None


class _Loader(importlib.abc.InspectLoader):
    """Runs one file of a set from memory."""

    def __init__(self, code: UserCode, file: str) -> None:
        self.code, self.file = code, file
        self.path = str(code.folder / file)

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.code.files[self.file])

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.path
        # imports of this module look into its own set first, also those made later, in a function
        module.__dict__["__builtins__"] = {
            **vars(builtins),
            "__import__": _importer(self.code),
        }
        program = compile(self.code.files[self.file], self.path, "exec", dont_inherit=True)
        exec(program, module.__dict__)


def _importer(code: UserCode) -> Any:
    """`__import__` for modules of a set: its own files by their own names, the rest as ever."""
    names = {file.partition("/")[0].removesuffix(".py") for file in code.files}
    prefix, main = code.module_name, code.main.removesuffix(".py")

    def find(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or top not in names or top in NEVER:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        full = f"{prefix}.{_stem(main) if name == main else name}"
        module = importlib.import_module(full)
        if not fromlist:
            return sys.modules[f"{prefix}.{_stem(main) if top == main else top}"]
        for part in fromlist:
            if part != "*" and not hasattr(module, part):
                try:
                    importlib.import_module(f"{full}.{part}")
                except ModuleNotFoundError as missing:
                    if missing.name != f"{full}.{part}":
                        raise
        return module

    return find
