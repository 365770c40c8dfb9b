"""A model's pieces that are somebody's code: copied into folders, and opened from them again.

    code/manifest.json              whose code it is: names, hashes, where they came from
    code/0123456789ab/my_rule.py    a user's file with its helpers, under the start of its hash

A run, a comparison and a model's folder each carry a copy of the code that they need. Names in
their files point into it: `code/0123456789ab/my_rule.py:MyRule`.
"""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyak import trust, usercode
from polyak.errors import RunError, TrustError
from polyak.files import make_folder, read_json, write_atomic, write_json
from polyak.nn.attention_registry import KINDS
from polyak.nn.config import ModelConfig
from polyak.nn.rule_places import names_in, parts_of, renamed
from polyak.registry import Registry, source_of
from polyak.rules._registry import RULES

AXES: dict[str, Registry[Any]] = {"rule": RULES, "attention": KINDS}
"""Fields of `ModelConfig` that name a piece, and where its names are found."""
FOLDER, MANIFEST, FORMAT = "code", "manifest.json", 1


def portable(name: str) -> str:
    """A piece's name as it holds in every folder that carries a copy of its code.

    Raises:
        RunError: a user's file is gone.
    """
    file = source_of(name)
    if file is None:
        return name
    code = usercode.read(file, error=RunError)
    return f"{FOLDER}/{code.sha256[:12]}/{code.main}:{_class_of(name)}"


def portable_values(config: ModelConfig) -> dict[str, Any]:
    """`config.to_dict()` with portable names, for JSON."""
    values = config.to_dict()
    short = {name: portable(name) for _, name in named_pieces(config)}
    return {**values, **{axis: _renamed(axis, values[axis], short) for axis in AXES}}


def source_hash(text: str) -> str | None:
    """What identifies pieces that come from users' files: the hash of their content, or hashes."""
    files = [file for name in names_in(text) if (file := source_of(name)) is not None]
    return "+".join(usercode.read(file, error=RunError).sha256 for file in files) or None


def other_sources(config: ModelConfig) -> dict[str, str]:
    """`source_hash` of a model's pieces but its rule, by AXIS_source; only of users' files."""
    named = {
        f"{axis}_source": source_hash(name) for axis, name in named_pieces(config) if axis != "rule"
    }
    return {name: sha256 for name, sha256 in named.items() if sha256 is not None}


def same_name(one: Any, other: Any) -> bool:
    """Whether two names may mean one piece: their class decides, and then their hashes.

    Of several rules, every part must be the same in this sense.
    """
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    ours, theirs = parts_of(one), parts_of(other)
    return len(ours) == len(theirs) and all(
        a == b
        or (
            ":" in a.rule
            and ":" in b.rule
            and a.named(_class_of(a.rule)) == b.named(_class_of(b.rule))
        )
        for a, b in zip(ours, theirs, strict=True)
    )


def keep(
    folder: Path, config: ModelConfig, *, run: str | None = None, origins: bool = True
) -> ModelConfig:
    """Copy a model's code into a folder, and sign that it was done here.

    Args:
        folder: of a run, a comparison or a model; made if there is code to keep.
        config: the model.
        run: identity of the run; None: that of the code that is there already, or a new one.
        origins: record where files came from, to say later that they have changed there. Not for
            folders that go to others.

    Returns:
        The model with its names pointing to the copies.

    Raises:
        RunError: a file is gone, or the folder cannot be written.
    """
    named = [(axis, name) for axis, name in named_pieces(config) if _is_code(axis, name)]
    if not named:
        return config
    manifest = _manifest(folder) or {"format": FORMAT, "run": run or secrets.token_hex(16)}
    pieces = {piece["name"]: piece for piece in manifest.get("pieces", [])}
    copies: dict[str, str] = {}
    for _, name in named:
        file, short = source_of(name), portable(name)
        sha256, origin = source_hash(name), None
        if file is not None:
            code = usercode.read(file, error=RunError)
            for path, content in code.files.items():
                _write(folder / FOLDER / code.sha256[:12] / path, content)
            copies[name] = str(folder.resolve() / short)
            origin = (_origin(file, name) or str(file)) if origins else None
        if short in pieces and pieces[short].get("sha256") == sha256 and pieces[short].get("mac"):
            continue
        mac = trust.sign(*_statement(manifest["run"], short, sha256, origin))
        pieces[short] = {"name": short, "sha256": sha256, "origin": origin, "mac": mac}
    make_folder(folder / FOLDER)
    wanted = {**manifest, "pieces": list(pieces.values())}
    if wanted != manifest:
        write_json(folder / FOLDER / MANIFEST, wanted)
    moved: dict[str, Any] = {
        axis: _renamed(axis, getattr(config, axis), copies)
        for axis in dict.fromkeys(axis for axis, name in named if name in copies)
    }
    return dataclasses.replace(config, **moved)


def code_folder(model: Path) -> Path:
    """Which folder's copy of the code counts for a model's folder.

    Inside a run it is the run's, which knows where its code came from.
    """
    run = model.parent
    whole = (run / "run.json").is_file() and (run / FOLDER / MANIFEST).is_file()
    return run if whole else model


def brings_code(values: Mapping[str, Any]) -> bool:
    """Whether a model's settings name code that is not this package's."""
    return any(_is_code(axis, name) for axis in AXES for name in _names(axis, values.get(axis)))


def opened(
    folder: Path, values: Mapping[str, Any], *, recorded: str | None = None
) -> dict[str, Any]:
    """A model's settings as a folder has them, its code found there and allowed to run.

    Nothing is run here. Says in a warning what has changed since the folder was written: the
    copy, or the file that it came from.

    Args:
        folder: of a run, a comparison or a model.
        values: fields of `ModelConfig`.
        recorded: hash of the code where the folder has no manifest of it, as older runs.

    Raises:
        TrustError: the code was not made here, and there is no word for it (`polyak.trust`).
        RunError: the code is not there, or lies outside of the folder.
    """
    found = dict(values)
    for axis in AXES:
        places = {
            name: _opened(folder, axis, name, recorded)
            for name in _names(axis, values.get(axis))
            if _is_code(axis, name)
        }
        if places:
            found[axis] = _renamed(axis, found[axis], places)
    return found


def known(folder: Path, name: str) -> str:
    """A name that the user gave, or the copy of it that this user's folder has.

    A file that has moved or is gone is known by its content or its place. If it has changed since
    it was copied, a warning says so, and the copy counts.
    """
    file = source_of(name)
    if file is None or not (folder / FOLDER / MANIFEST).exists():
        return name
    sha256 = _hash_there(file)
    manifest = _manifest(folder) or {}
    for piece in manifest.get("pieces", []):
        short = piece["name"]
        copy = folder / short.rpartition(":")[0]
        if _class_of(short) != _class_of(name) or not copy.is_file():
            continue
        same = piece.get("sha256") == sha256
        if not same and piece.get("origin") != str(file):
            continue
        kept = source_hash(f"{copy}:{_class_of(name)}")
        if not trust.is_ours(
            piece.get("mac"), *_statement(manifest["run"], short, kept, piece.get("origin"))
        ):
            continue
        if not same and sha256 is not None:
            _say_changed(file, folder)
        return f"{copy.resolve()}:{_class_of(name)}"
    return name


def _opened(folder: Path, axis: str, name: str, recorded: str | None) -> str:
    file, kind = source_of(name), AXES[axis].kind
    manifest = _manifest(folder) or {}
    piece: dict[str, Any] = next((p for p in manifest.get("pieces", []) if p["name"] == name), {})
    origin, sha256 = piece.get("origin"), None
    full, what = name, f"the {kind} {name!r} of an installed package"
    loaded = False
    if file is not None:
        source = Path(name.rpartition(":")[0])
        if not source.is_absolute():
            file = (folder / source).resolve()
            if not file.is_relative_to((folder / FOLDER).resolve()):
                raise RunError(
                    f"{folder}: {kind} {name!r} lies outside of the folder's {FOLDER}/; "
                    "a folder's code lies there"
                )
        code = usercode.read(file, error=RunError)
        sha256, loaded = code.sha256, code.is_loaded
        full = f"{file}:{_class_of(name)}"
        what = f"class {_class_of(name)} of {file} (SHA-256 {sha256[:12]}…)"
    ours = trust.is_ours(
        piece.get("mac"), *_statement(str(manifest.get("run")), name, sha256, origin)
    )
    if not (ours or loaded or trust.is_trusted()):
        raise TrustError(
            f"{folder} brings code of its own that was not made here: {what}; read it, and allow "
            "it with --trust-code (trust_code=True in Python, trust_remote_code=True in "
            "Hugging Face's classes)"
        )
    written = piece.get("sha256", recorded)
    if file is not None and written is not None and written != sha256:
        warnings.warn(
            f"{file} has changed since {folder} was trained; the model may compute something else",
            stacklevel=1,
        )
    if ours and origin is not None and _hash_there(Path(origin)) not in (None, sha256):
        _say_changed(Path(origin), folder)
    return full


def _hash_there(file: Path) -> str | None:
    return usercode.read(file, error=RunError).sha256 if file.is_file() else None


def _say_changed(file: Path, folder: Path) -> None:
    warnings.warn(
        f"{file} has changed since it was copied into {folder}; the copy there is used",
        stacklevel=1,
    )


def named_pieces(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(axis, name) of every piece of a model."""
    return ((axis, name) for axis in AXES for name in _names(axis, getattr(config, axis)))


def _names(axis: str, value: Any) -> tuple[str, ...]:
    """The names in a field that names pieces: a model may have several rules."""
    if not isinstance(value, str):
        return ()
    return names_in(value) if axis == "rule" else (value,)


def _renamed(axis: str, value: str, names: Mapping[str, str]) -> str:
    """A field that names pieces, with their other names where they have one."""

    def other(name: str) -> str:
        return names.get(name, name)

    return renamed(value, other) if axis == "rule" else other(value)


def _is_code(axis: str, name: str) -> bool:
    """Whether to look the name up would run code that this package and process do not have."""
    return AXES[axis].brings_code(name)


def _class_of(name: str) -> str:
    return name.rpartition(":")[2]


def _statement(
    run: str, name: str, sha256: str | None, origin: str | None
) -> tuple[str | None, ...]:
    return "code", run, name if sha256 is None else _class_of(name), sha256, origin


def _origin(file: Path, name: str) -> str | None:
    """Where a copy came from; None for a file that is no copy."""
    folder = file.parents[2] if len(file.parents) > 2 and file.parents[1].name == FOLDER else None
    if folder is None:
        return None
    pieces = (_manifest(folder) or {}).get("pieces", [])
    found = {piece["name"]: piece.get("origin") for piece in pieces}
    origin: str | None = found.get(f"{file.relative_to(folder).as_posix()}:{_class_of(name)}")
    return origin


def _manifest(folder: Path) -> dict[str, Any] | None:
    file = folder / FOLDER / MANIFEST
    if not file.exists():
        return None
    content: Any = read_json(file)
    pieces = content.get("pieces") if isinstance(content, dict) else None
    if not (
        isinstance(pieces, list)
        and isinstance(content.get("run"), str)
        and all(isinstance(p, dict) and isinstance(p.get("name"), str) for p in pieces)
        and all(isinstance(p.get("origin"), str | None) for p in pieces)
        and all(isinstance(p.get("sha256"), str | None) for p in pieces)
    ):
        raise RunError(f"{file} is not a list of code: 'run' or 'pieces' is missing or odd")
    return dict(content)


def _write(file: Path, content: bytes) -> None:
    if not file.is_file() or file.read_bytes() != content:
        make_folder(file.parent)
        write_atomic(file, content)
