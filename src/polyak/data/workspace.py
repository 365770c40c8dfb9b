"""The cache folder, and building a folder in it that appears only when it is complete.

Two ways to build: `building` begins anew each time, `resumable` keeps what a killed process left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from polyak.errors import DataError
from polyak.files import make_folder, sync_folder

_PREFIX, _PARTIAL, _LOCK = ".writing-", ".partial-", ".lock"

# What nobody has gone on with for so long is removed.
_FORGOTTEN = 14 * 24 * 3600.0


def default_cache() -> Path:
    """`$POLYAK_CACHE`, else `$XDG_CACHE_HOME/polyak`, else `~/.cache/polyak`."""
    if own := os.environ.get("POLYAK_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "polyak"
    return Path.home() / ".cache" / "polyak"


@contextlib.contextmanager
def building(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to write into; renamed to `final` at the end of the block.

    If the block raises, the folder is removed. If the process is killed, it stays behind under a
    name starting with `.writing-`, and the next `building` in the same place removes it. If
    someone else has finished `final` meanwhile, theirs is kept and ours removed: both were built
    from the same fingerprint. Anything the operating system refuses is one `DataError`.
    """
    parent = make_folder(final.parent, error=DataError)
    try:
        _remove_abandoned(parent)
        with _claimed(parent) as folder:
            yield folder
            sync_folder(folder)
            try:
                folder.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
            sync_folder(parent)
    except OSError as problem:
        reason = problem.strerror or problem
        raise DataError(f"cannot write in folder {parent}: {reason}") from problem


@contextlib.contextmanager
def resumable(final: Path) -> Iterator[Path | None]:
    """The folder in which `final` is being built, with what was done before; renamed at the end.

    One process works at a time: others wait, and get None if `final` is finished meanwhile. If
    the block raises, or the process is killed, the folder stays, to go on another time; it is
    removed when nobody does so for two weeks. Where the file system cannot lock files, this is
    `building`.
    """
    parent = make_folder(final.parent, error=DataError)
    folder = parent / f"{_PARTIAL}{final.name}"
    lock_file = folder.with_name(folder.name + _LOCK)
    try:
        _remove_abandoned(parent)
        descriptor = _lock_by_name(lock_file)
        if descriptor is None:
            with building(final) as private:
                yield private
            return
        try:
            if final.exists():
                yield None
            else:
                folder.mkdir(exist_ok=True)
                yield folder
                sync_folder(folder)
                folder.rename(final)
                sync_folder(parent)
        finally:
            with contextlib.suppress(OSError):
                if not folder.exists():
                    lock_file.unlink()
            os.close(descriptor)
    except OSError as problem:
        reason = problem.strerror or problem
        raise DataError(f"cannot write in folder {parent}: {reason}") from problem


def _lock_by_name(path: Path) -> int | None:
    """A descriptor of the locked file; waits for whoever has it. None if it can't be locked."""
    told = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = _lock(descriptor)
        if locked is None:
            os.close(descriptor)
            return None
        if locked:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        elif not told:
            name = path.name.removeprefix(_PARTIAL).removesuffix(_LOCK)
            warnings.warn(
                f"another process is preparing {name}; waiting for it to finish", stacklevel=4
            )
            told = True
        os.close(descriptor)
        if not locked:
            time.sleep(0.1)


def discard(folder: Path) -> None:
    """Remove a folder, at once as far as other processes can see."""
    try:
        with _claimed(folder.parent) as claimed, contextlib.suppress(FileNotFoundError):
            folder.rename(claimed / "discarded")
    except OSError as problem:
        raise DataError(f"cannot remove {folder}: {problem.strerror}") from problem


# A folder being written has a lock file beside it, locked by its writer. The lock dies with the
# process: a lock file that can be locked was left by a killed one.


@contextlib.contextmanager
def _claimed(parent: Path) -> Iterator[Path]:
    """A new folder that nobody else takes for abandoned; what is left of it is removed."""
    while True:
        folder = parent / f"{_PREFIX}{secrets.token_hex(6)}"
        lock_file = folder.with_suffix(_LOCK)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Someone may have taken the file for abandoned before it was locked, or removed it.
        if _lock(descriptor) is not False and lock_file.exists():
            break
        os.close(descriptor)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)  # before unlink: Windows removes no open files
        with contextlib.suppress(OSError):
            lock_file.unlink()


def _remove_abandoned(parent: Path) -> None:
    forgotten = (
        lock_file
        for lock_file in parent.glob(f"{_PARTIAL}*{_LOCK}")
        if time.time() - _last_written(lock_file.with_suffix("")) > _FORGOTTEN
    )
    for lock_file in itertools.chain(parent.glob(f"{_PREFIX}*{_LOCK}"), forgotten):
        try:
            descriptor = os.open(lock_file, os.O_RDWR)
        except OSError:
            continue  # finished this moment, or another user's
        try:
            if _lock(descriptor):
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                with contextlib.suppress(OSError):
                    lock_file.unlink()
        finally:
            os.close(descriptor)


def _last_written(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:  # it was finished this moment
        return time.time()


if sys.platform == "win32":

    def _lock(descriptor: int) -> bool | None:
        """Unknown on Windows: abandoned folders stay until the cache is deleted."""
        return None

else:
    import fcntl

    def _lock(descriptor: int) -> bool | None:
        """Lock a file: True, False if someone else has it, None if the file system cannot."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True
