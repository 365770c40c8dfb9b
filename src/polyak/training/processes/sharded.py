"""Named tensors on the disk, written and read by any number of processes; never a pickle.

One process, or several with equal copies (DDP), write one ordinary safetensors file:

    model.safetensors

With FSDP2 every process writes its own shards, and the header of each file says where they go:

    model-00001-of-00004.safetensors … model-00004-of-00004.safetensors

    "pieces": {"blocks.0.mlp.up.weight": {"shape": [1536, 384], "dim": 0, "start": 384}, …}

A shard is a slab of the whole tensor along one dimension. What is not a shard (scalars, counters)
is whole, in the first file. Readers take what they need of any layout, so a checkpoint saved by
one number of processes is loaded by another.

Why not `torch.distributed.checkpoint`: its default format has a pickle (`.metadata`), and its
`HuggingFaceStorageReader`, which has none, takes a missing file for a smaller tensor and leaves
the part unread (tried with torch 2.13).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from polyak.errors import RunError
from polyak.files import give_usual_permissions, parse_json, reason, sync_file
from polyak.training.dtensors import is_sharded
from polyak.training.processes.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMES = {kind: str(dtype).removeprefix("torch.") for dtype, kind in _KINDS.items()}


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], world: World) -> list[Path]:
    """Write tensors, flushed to the disk; every process calls it with the same names.

    Args:
        folder: must exist, and hold nothing under this name yet.
        name: of the file, without its ending.
        tensors: plain tensors, equal on all processes, and DTensors sharded along one dimension.
        world: the processes.

    Returns:
        The files, those of other processes too.

    Raises:
        RunError: a file could not be written; raised by every process.
    """
    sharded = world.size > 1 and any(is_sharded(tensor) for tensor in tensors.values())
    count = world.size if sharded else 1
    paths = [folder / _file_name(name, number, count) for number in range(count)]
    mine: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if is_sharded(tensor):
            where = _slab(tensor)
            local = tensor.to_local()
            if local.numel() or world.main:  # an empty tensor is somewhere too
                mine[key] = _compact(local)
                pieces[key] = {"shape": list(tensor.shape), "dim": where.dim, "start": where.start}
        elif world.main:
            mine[key] = _compact(tensor)
    problem = None
    if sharded or world.main:
        metadata = {"format": "pt", **({"pieces": json.dumps(pieces)} if sharded else {})}
        problem = _write(paths[world.rank], mine, metadata)
    world.agree(problem)
    return paths


def load(folder: Path, name: str, like: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Read tensors as `save` wrote them, by whatever number of processes.

    Args:
        folder: where they are.
        name: of the file, without its ending.
        like: what to read: names, shapes, dtypes, devices and, for DTensors, which shard. Its
            values are neither read nor changed.
        world: the processes; every one calls it.

    Returns:
        New tensors, placed as those of `like`.

    Raises:
        RunError: files are missing, damaged or something else than safetensors; or names, shapes
            or dtypes are not those of `like`. Raised by every process.
    """
    found: dict[str, Tensor] = {}
    problem = None
    try:
        with ExitStack() as stack:
            saved = _open(folder, name, stack)
            _check(folder / name, saved, like)
            found = {key: _read(saved[key], tensor) for key, tensor in like.items()}
    except RunError as error:
        problem = error
    except (SafetensorError, OSError, RuntimeError) as error:  # while reading a tensor
        problem = RunError(f"{folder / name}.safetensors cannot be read: {_one_line(error)}")
    world.agree(problem)
    return found


@dataclass(frozen=True)
class _Slab:
    """Rows [start, stop) of a tensor along one dimension."""

    dim: int
    start: int
    stop: int

    def box(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """From where to where along each dimension."""
        edges = [(0, length) for length in shape]
        if shape:
            edges[self.dim] = (self.start, self.stop)
        return edges


@dataclass
class _Saved:
    """A tensor on the disk: its pieces, each with the open file it is in."""

    shape: tuple[int, ...]
    kind: str
    pieces: list[tuple[_Slab, Any]] = field(default_factory=list)

    def whole(self) -> bool:
        """Whether the pieces cover the tensor, each place once."""
        reached: dict[int, int] = {}
        for slab, _ in sorted(self.pieces, key=lambda piece: piece[0].start):
            if slab.start != reached.get(slab.dim, 0):
                return False
            reached[slab.dim] = slab.stop
        if not self.shape:
            return len(self.pieces) == 1
        return len(reached) == 1 and all(end == self.shape[dim] for dim, end in reached.items())


def _slab(tensor: Tensor) -> _Slab:
    """The slab of a tensor that this process holds: all of a plain one."""
    if not is_sharded(tensor):
        return _Slab(0, 0, tensor.shape[0] if tensor.ndim else 1)
    mesh, placements = tensor.device_mesh, tensor.placements
    assert mesh.ndim == 1, "one mesh dimension, as `wrap` makes it"
    (placement,) = placements
    assert placement.is_shard(), placement
    dim = placement.dim  # type: ignore[attr-defined]  # a Shard
    length = tensor.shape[dim]
    step = -(-length // mesh.size())  # torch.chunk: equal parts, the last ones shorter or empty
    start = min(length, mesh.get_local_rank() * step)
    slab = _Slab(dim, start, min(length, start + step))
    assert tensor.to_local().shape[dim] == slab.stop - slab.start
    return slab


def _compact(tensor: Tensor) -> Tensor:
    """On the CPU, in order, and in memory of its own."""
    local = tensor.detach().cpu().contiguous()
    alone = local.untyped_storage().nbytes() == local.numel() * local.element_size()
    return local if alone else local.clone()


def _file_name(name: str, number: int, count: int) -> str:
    part = f"-{number + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{name}{part}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> RunError | None:
    try:
        save_file(tensors, path, metadata=metadata)
        give_usual_permissions(path)
        sync_file(path)
    except (OSError, SafetensorError) as error:
        return RunError(f"cannot write {path}: {_one_line(error)}")
    return None


def _open(folder: Path, name: str, stack: ExitStack) -> dict[str, _Saved]:
    saved: dict[str, _Saved] = {}
    for path in _files(folder, name):
        try:
            handle: Any = stack.enter_context(safe_open(path, framework="pt"))
            pieces = parse_json(
                (handle.metadata() or {}).get("pieces", "{}"), f"the pieces in {path}"
            )
            for key in handle.keys():  # noqa: SIM118  # not a mapping
                view = handle.get_slice(key)
                local = tuple(view.get_shape())
                entry = pieces.get(key, {"shape": local, "dim": 0, "start": 0})
                shape, dim, start = tuple(entry["shape"]), int(entry["dim"]), int(entry["start"])
                others = (shape[:dim], shape[dim + 1 :])
                if others != (local[:dim], local[dim + 1 :]) or len(local) != len(shape):
                    raise ValueError(f"the piece of {key!r} has another shape than the tensor")
                tensor = saved.setdefault(key, _Saved(shape, view.get_dtype()))
                if (tensor.shape, tensor.kind) != (shape, view.get_dtype()):
                    raise ValueError(f"{key!r} has another shape or dtype than in other files")
                slab = _Slab(dim, start, start + (local[dim] if local else 1))
                tensor.pieces.append((slab, (handle, key)))
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{path} is damaged or not a safetensors file: {_one_line(error)}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise RunError(f"{path}: its list of pieces is wrong: {_one_line(error)}") from error
    return saved


def _files(folder: Path, name: str) -> list[Path]:
    """One whole file, or the complete set of shards."""
    single = folder / _file_name(name, 0, 1)
    pattern = re.compile(rf"{re.escape(name)}-(\d{{5}})-of-(\d{{5}})\.safetensors")
    try:
        matches = [pattern.fullmatch(path.name) for path in sorted(folder.iterdir())]
    except OSError as error:
        raise RunError(f"cannot read {folder}: {reason(error)}") from error
    shards = [match for match in matches if match is not None]
    if single.exists() and not shards:
        return [single]
    if not shards:
        raise RunError(f"{single} is missing")
    counts = {int(match[2]) for match in shards}
    if len(counts) > 1 or single.exists():
        raise RunError(f"{folder} holds {name!r} more than once; its files do not belong together")
    (count,) = counts
    paths = [folder / _file_name(name, number, count) for number in range(count)]
    for path in paths:
        if not path.exists():
            raise RunError(f"{path} is missing")
    if count < 2 or len(paths) != len(shards):
        raise RunError(f"{folder}: the shards of {name!r} are misnumbered")
    return paths


def _check(path: Path, saved: Mapping[str, _Saved], like: Mapping[str, Tensor]) -> None:
    for problem, names in (
        ("has no", sorted(like.keys() - saved.keys())),
        ("has an unexpected", sorted(saved.keys() - like.keys())),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise RunError(f"{path}.safetensors {problem} tensor {names[0]!r}{more}")
    for key, tensor in like.items():
        entry, kind = saved[key], _KINDS[tensor.dtype]
        if entry.shape != tuple(tensor.shape) or entry.kind != kind:
            raise RunError(
                f"{path}.safetensors: {key!r} is {_NAMES.get(entry.kind, entry.kind)} of shape "
                f"{entry.shape} there, {_NAMES[kind]} of shape {tuple(tensor.shape)} here"
            )
        if not entry.whole():
            raise RunError(f"{path}.safetensors: the pieces of {key!r} do not make the whole")


def _read(saved: _Saved, like: Tensor) -> Tensor:
    """The tensor, or this process's shard of it."""
    wanted = _slab(like)
    edges = wanted.box(saved.shape)
    local = torch.empty([stop - start for start, stop in edges], dtype=like.dtype)
    for slab, (handle, key) in saved.pieces:
        if not saved.shape:
            local.copy_(handle.get_tensor(key))
            continue
        there = slab.box(saved.shape)
        overlap = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(edges, there, strict=True)]
        if all(start < stop for start, stop in overlap):
            source = _slices(overlap, there)
            local[_slices(overlap, edges)].copy_(handle.get_slice(key)[source])
    local = local.to(like.device)
    return _as_shard(local, like) if is_sharded(like) else local


def _slices(overlap: list[tuple[int, int]], origin: list[tuple[int, int]]) -> tuple[slice, ...]:
    """An overlap in the coordinates of a box that holds it."""
    return tuple(
        slice(start - low, stop - low)
        for (start, stop), (low, _) in zip(overlap, origin, strict=True)
    )


def _as_shard(local: Tensor, like: DTensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        return reason(error)
    return " ".join(str(error).split())
