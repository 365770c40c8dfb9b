"""Named tensors on the disk: whole, in shards, and damaged in every way."""

from __future__ import annotations

import json
import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import torchrun
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyak.errors import RunError
from polyak.training.processes import sharded
from polyak.training.processes.world import World

ALONE = World()
TENSORS = {
    "weight": torch.arange(12.0).view(3, 4),
    "step": torch.tensor(7.0),
    "count": torch.tensor(7),
    "half": torch.ones(5).to(torch.bfloat16),
    "none": torch.zeros(0, 3),
    "random": torch.arange(9, dtype=torch.uint8),
    "flag": torch.tensor([True, False]),
}


def like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def shards(folder: Path, parts: list[tuple[int, Tensor]], shape: list[int], dim: int = 0) -> None:
    """Files as several processes write them: (start, values) of a tensor `w` in each."""
    for number, (start, values) in enumerate(parts, 1):
        pieces = {"w": {"shape": shape, "dim": dim, "start": start}}
        path = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({"w": values}, path, metadata={"pieces": json.dumps(pieces)})


def error_of(folder: Path, wanted: dict[str, Tensor]) -> str:
    with pytest.raises(RunError) as caught:
        sharded.load(folder, "model", wanted, ALONE)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_one_process_saves_it_loads_bit_for_bit(tmp_path: Path) -> None:
    wanted = like(TENSORS)
    assert sharded.save(tmp_path, "model", TENSORS, ALONE) == [tmp_path / "model.safetensors"]
    found = sharded.load(tmp_path, "model", wanted, ALONE)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert not wanted[name].any()  # left as it was


def test_one_process_writes_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    sharded.save(tmp_path, "model", TENSORS, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_views_and_transposes_are_saved_as_what_they_show(tmp_path: Path) -> None:
    table = torch.arange(24.0).view(4, 6)
    views = {"rows": table[1:3], "columns": table.T, "again": table[1:3, 2]}
    sharded.save(tmp_path, "model", views, ALONE)
    found = sharded.load(tmp_path, "model", like(views), ALONE)
    assert all(torch.equal(found[name], tensor) for name, tensor in views.items())


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    data=st.data(),
)
def test_slabs_along_any_dimension_make_the_whole(
    shape: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[dim]), min_size=1, max_size=3)))
    edges = [0, *[cut for cut in cuts if cut < shape[dim]], shape[dim]]
    if len(edges) < 3:
        return  # one slab is a whole file
    folder = tmp_path_factory.mktemp("slabs")
    whole = torch.rand(shape)
    parts = [(a, whole.narrow(dim, a, b - a).contiguous()) for a, b in pairwise(edges)]
    shards(folder, parts, shape, dim)
    found = sharded.load(folder, "model", {"w": torch.zeros(shape)}, ALONE)
    assert torch.equal(found["w"], whole)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"w": torch.zeros(3, 2)}, "'w' is float32 of shape (2, 2) there, float32 of shape (3, 2)"),
        ({"w": torch.zeros(2, 2).double()}, "float32 of shape (2, 2) there, float64 of shape"),
        ({"w": torch.zeros(2, 2), "v": torch.zeros(1)}, "has no tensor 'v'"),
        ({}, "has an unexpected tensor 'w'"),
    ],
)
def test_other_names_shapes_and_dtypes_are_refused(
    tmp_path: Path, wanted: dict[str, Tensor], message: str
) -> None:
    sharded.save(tmp_path, "model", {"w": torch.ones(2, 2)}, ALONE)
    assert message in error_of(tmp_path, wanted)


def test_missing_files_and_shards_are_named(tmp_path: Path) -> None:
    wanted = {"w": torch.zeros(4)}
    assert "model.safetensors is missing" in error_of(tmp_path, wanted)
    assert "cannot read" in error_of(tmp_path / "nowhere", wanted)
    shards(tmp_path, [(0, torch.ones(1)), (1, torch.ones(2)), (3, torch.ones(1))], [4])
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in error_of(tmp_path, wanted)


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ([(0, torch.ones(2)), (3, torch.ones(1))], [4]),  # a gap
        ([(0, torch.ones(3)), (2, torch.ones(2))], [4]),  # an overlap
        ([(0, torch.ones(2)), (2, torch.ones(1))], [4]),  # short
        ([(0, torch.ones(2)), (2, torch.ones(3))], [4]),  # long
        ([(-1, torch.ones(2)), (1, torch.ones(3))], [4]),
    ],
)
def test_shards_that_do_not_make_the_whole_are_refused(
    tmp_path: Path, parts: list[tuple[int, Tensor]], shape: list[int]
) -> None:
    shards(tmp_path, parts, shape)
    assert "do not make the whole" in error_of(tmp_path, {"w": torch.zeros(shape)})


@pytest.mark.parametrize(
    "pieces",
    [
        *("{", "[]", "7", '{"w": 3}', '{"w": {}}', '{"w": {"shape": 4, "dim": 0}}'),
        '{"w": {"shape": [9], "dim": "x", "start": 0}}',
        '{"w": {"shape": [2, 2], "dim": 0, "start": 0}}',
    ],
)
def test_a_header_that_is_nonsense_is_refused(tmp_path: Path, pieces: str) -> None:
    for number in (1, 2):
        path = tmp_path / f"model-{number:05d}-of-00002.safetensors"
        save_file({"w": torch.ones(2)}, path, metadata={"pieces": pieces})
    assert str(tmp_path) in error_of(tmp_path, {"w": torch.zeros(4)})


def test_files_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    shards(tmp_path, [(0, torch.ones(2)), (2, torch.ones(2))], [4])
    sharded.save(tmp_path, "model", {"w": torch.ones(4)}, ALONE)
    assert "more than once" in error_of(tmp_path, {"w": torch.zeros(4)})


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    (path,) = sharded.save(tmp_path, "model", {"w": torch.ones(100)}, ALONE)
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or not a safetensors file" in error_of(tmp_path, {"w": torch.zeros(100)})


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    mark, target = tmp_path / "ran", tmp_path / "checkpoint"
    target.mkdir()
    evil = {"w": torch.zeros(4), "evil": _Evil(mark)}
    (target / ".metadata").write_bytes(pickle.dumps(evil))  # where torch's own format has it
    (target / "model.safetensors").write_bytes(pickle.dumps(evil))
    assert "not a safetensors file" in error_of(target, {"w": torch.zeros(4)})
    torch.save(evil, target / "model.safetensors")
    assert "not a safetensors file" in error_of(target, {"w": torch.zeros(4)})
    shards(target, [(0, torch.ones(2)), (2, torch.ones(2))], [4])
    (target / "model.safetensors").unlink()
    torch.save(evil, target / "model-00002-of-00002.safetensors")
    assert "not a safetensors file" in error_of(target, {"w": torch.zeros(4)})
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Evil(mark)))  # it would have
    assert mark.exists()


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*model.safetensors: ") as caught:
        sharded.save(tmp_path / "nowhere", "model", {"w": torch.ones(1)}, ALONE)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_shards_of_two_processes_are_saved_and_loaded_as_any_other_shards(tmp_path: Path) -> None:
    torchrun(2, "places", tmp_path)
    whole = {
        "odd": torch.arange(35.0).view(7, 5),
        "few": torch.arange(3.0).view(1, 3),
        "half": torch.arange(8).view(2, 2, 2).to(torch.bfloat16),
        "step": torch.tensor(3.0),
        "random": torch.arange(9, dtype=torch.uint8),
    }
    for name in ("rows", "columns"):
        assert (tmp_path / f"{name}-00002-of-00002.safetensors").exists()
        found = sharded.load(tmp_path, name, like(whole), ALONE)
        assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


@pytest.mark.slow
def test_a_process_that_cannot_write_its_shard_fails_them_all(tmp_path: Path) -> None:
    torchrun(2, "unwritable", tmp_path)
    texts = {(tmp_path / f"unwritable-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(texts) == 1
    assert texts.pop().startswith("process 1: cannot write ")


@pytest.mark.slow
def test_a_checkpoint_is_resumed_by_any_number_of_processes(tmp_path: Path) -> None:
    torchrun(1, "resume", tmp_path, RESUME="none:one")
    torchrun(2, "resume", tmp_path, RESUME="ddp:copied fsdp:sharded ddp:one fsdp:one")
    torchrun(2, "resume", tmp_path, RESUME="fsdp:copied ddp:sharded fsdp:sharded ddp:copied")
    torchrun(1, "resume", tmp_path, RESUME="none:copied none:sharded none:one")
    torchrun(3, "resume", tmp_path, RESUME="fsdp:sharded fsdp:one ddp:sharded")
    names = {path.name for path in (tmp_path / "sharded").iterdir()}
    assert "model-00002-of-00002.safetensors" in names
    assert {path.name for path in (tmp_path / "copied").iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
    }
    ends = sorted(tmp_path.glob("*.safetensors"))
    assert len(ends) == 12
    expected = load_file(tmp_path / "one-none-1.safetensors")
    for end in ends:
        for name, tensor in load_file(end).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=end.name)
