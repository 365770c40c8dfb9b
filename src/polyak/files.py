"""Writing files so that a reader never sees half of one, and hashing them.

Every result that matters (manifests, `run.json`, `results.json`, tokenizers) goes through
`write_atomic`: the bytes are written aside in the same folder, flushed to the disk and renamed
over the target, so that a killed process leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections import Counter
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
    """The JSON value in a file; missing, unreadable, malformed or odd raises `error` in one line.

    See `parse_json` for what is odd.
    """
    return parse_json(read_bytes(path, error=error), str(path), error=error)


def parse_json(content: bytes | str, where: str, *, error: type[PolyakError] = RunError) -> Any:
    """The value of JSON text that another program, or another person, may have written.

    JSON alone is taken: no NaN and no number beyond a float's range, no name twice in an object,
    no unpaired surrogate (text that cannot be written again), at most `DEEPEST` values inside
    one another and 4,300 digits in a whole number. A byte-order mark is left out.

    Args:
        content: UTF-8, or text.
        where: what an error's line begins with.
        error: the type that is raised.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(
            text, object_pairs_hook=each_once, parse_constant=_no_number, parse_float=_finite
        )
        if depth(value) > DEEPEST:
            raise ValueError(f"more than {DEEPEST} values inside one another")
        if "\\ud" in text.lower():  # the only way to an unpaired surrogate
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        deep = f"more than {DEEPEST} values inside one another"
        raise error(f"{where} is not valid JSON: {deep}") from None
    except UnicodeEncodeError as problem:
        raise error(f"{where} is not valid JSON: an unpaired surrogate in its text") from problem
    except ValueError as problem:  # not UTF-8, or not JSON
        raise error(f"{where} is not valid JSON: {_plain(problem)}") from problem
    return value


DEEPEST = 100
LONGEST = 1 << 30  # bytes; what is read as a whole is held as a whole


def read_bytes(path: Path, *, error: type[PolyakError] = RunError) -> bytes:
    """A file as a whole; missing, unreadable or above `LONGEST` bytes raises `error`."""
    try:
        with path.open("rb") as handle:
            content = handle.read(LONGEST + 1)
    except OSError as problem:
        raise error(f"cannot read {path}: {reason(problem)}") from problem
    if len(content) > LONGEST:
        raise error(f"{path} has more than {LONGEST:,} bytes, too many to be read as a whole")
    return content


def read_text(path: Path, *, error: type[PolyakError] = RunError) -> str:
    """A UTF-8 text that a user hands over; a byte-order mark is left out.

    Raises `error` (one line) where it is missing, unreadable or not UTF-8.
    """
    try:
        return read_bytes(path, error=error).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8: {problem}") from problem


def depth(value: Any) -> int:
    """How many lists and objects of a JSON value stand inside one another, itself included."""
    found, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        found += 1
        level = [
            part
            for inner in level
            for part in (inner.values() if isinstance(inner, dict) else inner)
        ]
    return found


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON from its pairs; `ValueError` where a name stands twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:80]!r} stands twice in one object")
    return made


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is beyond a number's range")
    return number


def _plain(problem: ValueError) -> str:
    """The problem; Python's own line on long integers recommends a function of Python."""
    text = str(problem)
    return "a whole number of more than 4,300 digits" if "set_int_max_str_digits" in text else text


def sha256_of(source: Path | bytes) -> str:
    """The SHA-256 of a file's contents (read in pieces) or of bytes, in hexadecimal."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of a value as JSON has it: the same before it is written and once it is read."""
    as_read = json.loads(json.dumps(value))
    return sha256_of(json.dumps(as_read, sort_keys=True).encode())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut (no-op on Windows)."""
    if os.name == "nt":  # Windows cannot open folders, and its renames need no such flush
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_permissions(path: Path) -> None:
    """Give a file that another library wrote the permissions that any new file here has.

    The weights of safetensors are readable by their owner only, whatever the umask says.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        aside.unlink()
    path.chmod(mode)


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
    return " ".join((problem.strerror or str(problem)).split())
