"""Writing files so that a reader never sees half of one, and hashing them.

Every result that matters (manifests, `run.json`, `results.json`, tokenizers) goes through
`write_atomic`: the bytes are written aside in the same folder, flushed to the disk and renamed
over the target, so that a killed process leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyak.errors import PolyakError, RunError, UnwritableError


def make_folder(path: Path, *, error: type[PolyakError] = UnwritableError) -> Path:
    """Create the folder and its parents if they are missing, and return it.

    Raises `error` (one line) where that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise error(f"cannot create folder {path}: {reason(problem)}") from problem
    return path


def write_atomic(
    path: Path, data: bytes | str, *, error: type[PolyakError] = UnwritableError
) -> None:
    """Replace the file at `path` by `data` (text is written as UTF-8), all or nothing.

    The folder must exist. On any failure the temporary file is removed and the old file, if
    there was one, is untouched. An unwritable folder or a full disk raises `error` in one line.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    # Not tempfile.mkstemp: its files are readable by the owner only, whatever the umask says.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise
        sync_folder(path.parent)
    except OSError as problem:
        raise error(f"cannot write {path}: {reason(problem)}") from problem


def write_json(path: Path, value: Any, *, error: type[PolyakError] = UnwritableError) -> None:
    """Write `value` as indented JSON, atomically.

    NaN and infinity are not JSON: they raise `ValueError`, so write None (null) for them.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text + "\n", error=error)


def read_json(path: Path, *, error: type[PolyakError] = RunError) -> Any:
    """The JSON value in a file; missing, unreadable or malformed raises `error` in one line."""
    try:
        return json.loads(path.read_bytes())
    except OSError as problem:
        raise error(f"cannot read {path}: {reason(problem)}") from problem
    except ValueError as problem:  # not UTF-8, or not JSON
        raise error(f"{path} is not valid JSON: {problem}") from problem


def sha256_of(source: Path | bytes) -> str:
    """The SHA-256 of a file's contents (read in pieces) or of bytes, in hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut (no-op on Windows)."""
    if os.name == "nt":  # Windows cannot open folders, and its renames need no such flush
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file that another library wrote to the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, user: str) -> Iterator[None]:
    """Hold a folder for this process alone; the lock goes with the process, however it ends.

    Args:
        folder: must exist; gets a file `.lock`.
        user: the command that uses the folder, named when it is refused to a second one.

    Raises:
        RunError: another process holds it, or it cannot be written. Windows has no such lock:
            two processes in one folder there are the user's to avoid.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        lock = (folder / ".lock").open("a")
    except OSError as problem:
        raise UnwritableError(f"cannot write in {folder}: {reason(problem)}") from problem
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder} is in use by another {user}; wait for it, or choose another --out"
            ) from None
        yield


def reason(problem: OSError) -> str:
    """`Permission denied`, without the errno and the path that the message names already."""
    return problem.strerror or str(problem)
