"""The corpora that every Python brings along: its standard library's sources and their prose.

Tests, third-party packages and files written by the build of one particular Python are left out,
so two machines with the same Python version see the same corpus.
"""

from __future__ import annotations

import ast
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from polyak.data.documents import Document, fingerprint_of
from polyak.data.left_out import LeftOut
from polyak.errors import DataError

_LEFT_OUT_FOLDERS = frozenset(
    {
        *("test", "tests", "idle_test"),
        *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),
        "_bundled",  # ensurepip's wheels
    }
)
# Written by the build or the administrator of one machine.
_LEFT_OUT_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class _Sources:
    """The library's files that are UTF-8: (name relative to the library's root, path)."""

    files: tuple[tuple[str, Path], ...]

    def __iter__(self) -> Iterator[Document]:
        for name, path in self.files:
            yield Document(name, _read(path).decode("utf-8"))


@dataclass(frozen=True)
class _Prose:
    """The docstrings of each file as one document, and each topic of `help()` as another."""

    sources: _Sources
    _parsed: list[Document] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        if not self._parsed:  # parsing takes seconds, the result a few megabytes
            found = [prose for source in self.sources for prose in _prose_of(source)]
            self._parsed.extend(found)
        return iter(self._parsed)


def stdlib() -> tuple[_Sources, str, LeftOut]:
    """(documents, fingerprint, files left out) of the standard library's `.py` files.

    Line ends are read as "\\n" on every platform.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = LeftOut()
    files, hashes = [], []
    for name, path in _list(root):
        content = _read(path)
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            left_out.add("not UTF-8", name)
            continue
        files.append((name, path))
        hashes.append((name, sha256(content).hexdigest()))
    if not files:
        raise DataError(
            f"this Python has no standard-library sources in {root}; give the path of a text file "
            "or folder as the corpus instead"
        )
    return _Sources(tuple(files)), fingerprint_of("stdlib", hashes), left_out


def prose() -> tuple[_Prose, str, LeftOut]:
    """(documents, fingerprint, files left out) of the library's docstrings and `help()` topics.

    The fingerprint is that of the sources and of the Python that parses them, so that reusing a
    prepared corpus needs no parsing.
    """
    sources, fingerprint, left_out = stdlib()
    version = platform.python_version()
    return _Prose(sources), fingerprint_of("prose 1", [(version, fingerprint)]), left_out


def _list(root: Path) -> Iterator[tuple[str, Path]]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in _LEFT_OUT_FOLDERS and name[:7] != "config-"
        ]
        for file in files:
            if file.endswith(".py") and not file.startswith(_LEFT_OUT_FILES):
                path = Path(folder, file)
                found.append((path.relative_to(root).as_posix(), path))
    yield from sorted(found)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().replace(b"\r\n", b"\n")
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror}") from problem


def _prose_of(source: Document) -> Iterator[Document]:
    assert isinstance(source.text, str)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source.text)
    except (SyntaxError, ValueError):
        return  # templates and deliberately broken files; they hold no docstring that Python sees
    docstrings = (
        ast.get_docstring(node, clean=False)
        for node in _walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    text = "\n\n".join(inspect.cleandoc(docstring) for docstring in docstrings if docstring)
    if text.strip():
        yield Document(source.name, text + "\n")
    if source.name == _TOPICS:
        for topic, explanation in sorted(_topics(tree).items()):
            yield Document(f"{_TOPICS}:{topic}", explanation)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All statements in the order of the source (`ast.walk` goes level by level)."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(
            child
            for child in reversed(list(ast.iter_child_nodes(node)))
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        )


def _topics(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(topic): str(text) for topic, text in ast.literal_eval(node.value).items()}
    return {}
