"""The cache folder, and building a folder in it that appears only when it is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from polyak.errors import DataError
from polyak.files import make_folder, sync_folder

_PREFIX, _LOCK = ".writing-", ".lock"


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
    for lock_file in parent.glob(f"{_PREFIX}*{_LOCK}"):
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
