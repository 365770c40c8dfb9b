"""Checkpoints: everything a run needs to go on, complete on the disk or not there at all.

checkpoints/step-000100/
    model.safetensors       weights (one file per process when they are sharded)
    optimizer.safetensors   optimizer state, by the name of its parameter
    state.json              counters of the loop
    manifest.json           step, whose it is (the run's identity), and size and SHA-256 of every
                            other file; written last

A checkpoint is written under another name, flushed to the disk and renamed, so a killed process
leaves whole checkpoints only. Nothing in one is a pickle, and loading one runs no code.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak import formats
from polyak.errors import PolyakError, RunError
from polyak.files import make_folder, read_json, reason, sha256_of, sync_folder, write_json
from polyak.reading import fields, mapping_of, optional, table, text, whole
from polyak.training.processes import sharded
from polyak.training.processes.distributed import World

_NAME = re.compile(r"step-(\d{6,})")
_PARTS = ("model", "optimizer")
_ASIDE, _REMOVED = ".writing-", ".removing-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have the hashes of its manifest.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        state: the content of `state.json`.
    """

    path: Path
    step: int
    state: dict[str, Any]

    def load(self, name: str, like: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
        """The tensors saved under `name`, placed as those of `like`.

        Raises:
            RunError: names or shapes differ.
        """
        return sharded.load(self.path, name, like, world)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's `checkpoints` folder; made at the first save.
        keep: how many of the newest to keep.
        world: the processes that save together; every one of them calls `save`.
        run: identity of the run, which every checkpoint carries; None for older runs.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, world: World, run: str | None = None
    ) -> None:
        self.folder, self.keep, self.world, self.run = folder, keep, world, run

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
    ) -> Path:
        """Write the checkpoint of a step, then remove the oldest beyond `keep`.

        Args:
            step: optimizer steps done.
            tensors: by file name (`model`, `optimizer`), then by tensor name.
            state: plain values for `state.json`.

        Raises:
            RunError: it could not be written; what there was before is untouched, and the last
                good checkpoint is named.
        """
        final = self.folder / f"step-{step:06d}"
        aside = self.folder / f"{_ASIDE}{final.name}"
        with self._explained(final):
            if self.world.main:
                if not self.folder.exists():
                    make_folder(self.folder)
                    sync_folder(self.folder.parent)
                self._sweep()
                aside.mkdir()
            self.world.barrier()
            for name, named in tensors.items():
                sharded.save(aside, name, named, self.world)
            self.world.barrier()
            if self.world.main:
                write_json(aside / "state.json", dict(state))
                _write_manifest(aside, step, self.run)
                sync_folder(aside)
                if final.exists():  # only a damaged one can be: a whole one would have been resumed
                    self._put_away(final)
                aside.rename(final)
                sync_folder(self.folder)
            self.world.barrier()
        if self.world.main:
            self._prune()
        return final

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; one warning for each newer one that is not.

        The first process looks and hashes; the others are told what it found.

        Raises:
            RunError: the folder cannot be read.
        """
        found = self._newest_whole() if self.world.main else None
        name = self.world.broadcast(found.name if found is not None else None)
        if name is None:
            return None
        path = self.folder / name
        return Checkpoint(path, _step_of(path), read_json(path / "state.json"))

    def _newest_whole(self) -> Path | None:
        for path in reversed(self._folders()):
            try:
                manifest = _check(path)
            except RunError as problem:
                warnings.warn(f"{problem}; trying the one before", stacklevel=3)
            else:
                self._check_owner(path, manifest)
                return path
        return None

    def _check_owner(self, path: Path, manifest: dict[str, Any]) -> None:
        if manifest.get("run", self.run) != self.run:
            raise RunError(
                f"checkpoint {path} belongs to another run: its identity is "
                f"{manifest.get('run')!r}, this run's {self.run!r}; move it back to where it "
                "came from"
            )

    def last_path(self) -> Path | None:
        """The newest checkpoint folder, by name only; for messages."""
        with contextlib.suppress(OSError):
            return next(reversed(self._folders()), None)
        return None

    def _folders(self) -> list[Path]:
        try:
            found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        except OSError as problem:
            raise RunError(f"cannot read {self.folder}: {reason(problem)}") from problem
        return sorted(found, key=_step_of)

    def _prune(self) -> None:
        """Remove all but the newest `keep` whole checkpoints; a damaged one counts for nothing."""
        whole = [path for path in self._folders() if _complete(path)]
        try:
            for path in whole[: -self.keep]:
                self._put_away(path)
        except OSError as problem:
            raise RunError(
                f"cannot remove the old checkpoint {path}: {reason(problem)}; the newest, "
                f"{whole[-1]}, is good"
            ) from problem

    def _put_away(self, path: Path) -> None:
        """Remove a checkpoint; its name disappears at once, so no half of it is ever found."""
        gone = path.with_name(f"{_REMOVED}{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written or half-removed."""
        for pattern in (f"{_ASIDE}*", f"{_REMOVED}*"):
            for left in self.folder.glob(pattern):
                shutil.rmtree(left)

    @contextlib.contextmanager
    def _explained(self, final: Path) -> Iterator[None]:
        """Turn whatever goes wrong while saving into one line that names the last good one."""
        try:
            yield
        except (OSError, PolyakError) as problem:
            why = reason(problem) if isinstance(problem, OSError) else str(problem)
            raise RunError(
                f"cannot save checkpoint {final}: {why}; last good checkpoint: "
                f"{self.last_path() or 'none'}"
            ) from problem
        finally:
            if self.world.main:
                shutil.rmtree(self.folder / f"{_ASIDE}{final.name}", ignore_errors=True)


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _write_manifest(folder: Path, step: int, run: str | None) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    made = {"format": formats.current("checkpoint"), "run": run, "step": step, "files": files}
    write_json(folder / "manifest.json", made)


def _complete(path: Path) -> bool:
    """Whether the files are those of the manifest, by size."""
    try:
        for file, entry in _manifest(path)["files"].items():
            if (path / file).stat().st_size != entry["bytes"]:
                return False
    except (RunError, OSError):
        return False
    return True


_MANIFEST = {
    "step": whole(),
    "run": optional(text(64)),
    "files": mapping_of(table({"bytes": whole(), "sha256": text(64)}), 100_000),
}


def _manifest(path: Path) -> dict[str, Any]:
    manifest = formats.read(path / "manifest.json", "checkpoint")
    fields(manifest, str(path / "manifest.json"), _MANIFEST)
    files = manifest["files"]
    if (
        manifest["step"] != _step_of(path)
        or not all(any(f.startswith(part) for f in files) for part in ("state.json", *_PARTS))
        or not all(Path(file).name == file for file in files)
    ):
        raise RunError(f"{path / 'manifest.json'} is not the manifest of this checkpoint")
    return manifest


def _check(path: Path) -> dict[str, Any]:
    """The manifest; raises RunError unless every file of the checkpoint has its hash."""
    manifest = _manifest(path)
    for file, entry in manifest["files"].items():
        try:
            size = (path / file).stat().st_size
            if size != entry["bytes"]:
                raise RunError(
                    f"checkpoint {path} is damaged: {file} has {size} bytes instead of "
                    f"{entry['bytes']}"
                )
            if sha256_of(path / file) != entry["sha256"]:
                raise RunError(f"checkpoint {path} is damaged: {file} has another SHA-256")
        except OSError as problem:
            raise RunError(
                f"checkpoint {path} is damaged: cannot read {file}: {reason(problem)}"
            ) from problem
    return manifest


Every = Callable[[int, float], bool]


def due(every: int | None, minutes: float) -> Every:
    """When to save: `due(…)(step, seconds since the last save)`.

    Args:
        every: steps between checkpoints, or None.
        minutes: minutes between checkpoints, when `every` is None.
    """
    if every is not None:
        return lambda step, elapsed: step % every == 0
    return lambda step, elapsed: elapsed >= 60 * minutes
