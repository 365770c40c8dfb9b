"""Batches are a pure function of seed and step; validation is one fixed set."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.data.batches import TrainBatches, ValidationBatches
from polyak.errors import ConfigError, DataError

sizes = st.tuples(
    st.integers(2, 400), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**70)
).filter(lambda size: size[0] > size[1])


def _epoch(batches: TrainBatches, epoch: int) -> np.ndarray[Any, Any]:
    """The sequences of one epoch (batch size 1), in order."""
    n = batches.blocks_per_epoch
    return np.concatenate([batches.batch(step) for step in range(epoch * n, (epoch + 1) * n)])


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_each_epoch_uses_every_block_once_and_blocks_do_not_overlap(
    size: tuple[int, int, int, int],
) -> None:
    length, context, _, seed = size
    batches = TrainBatches(np.arange(length), context, 1, seed)
    assert batches.blocks_per_epoch == (length - 1) // context
    for epoch in range(3):
        blocks = _epoch(batches, epoch)
        assert blocks.shape[1] == context + 1
        assert ((np.diff(blocks, axis=1) % length) == 1 % length).all()  # consecutive on the ring
        targets = blocks[:, 1:].ravel()
        assert len(np.unique(targets)) == targets.size
        starts = np.sort(blocks[:, 0])
        if epoch == 0:  # from the beginning on, with nothing between the blocks
            assert (starts == np.arange(len(starts)) * context).all()


@given(sizes, st.lists(st.integers(0, 500), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_batch_depends_on_seed_and_step_alone(
    size: tuple[int, int, int, int], steps: list[int]
) -> None:
    length, context, batch_size, seed = size
    tokens = np.arange(length, dtype=np.uint16)
    used = TrainBatches(tokens, context, batch_size, seed)
    for step in [*steps, *reversed(steps)]:
        fresh = TrainBatches(tokens, context, batch_size, seed)
        batch = used.batch(step)
        assert batch.dtype == np.int64
        assert batch.shape == (batch_size, context + 1)
        assert (batch == fresh.batch(step)).all()
        batch[:] = -1  # a caller may write into what it was given


@given(sizes)
@settings(max_examples=40, deadline=None)
def test_the_batch_size_only_groups_the_sequences(size: tuple[int, int, int, int]) -> None:
    length, context, batch_size, seed = size
    tokens = np.arange(length)
    one = TrainBatches(tokens, context, 1, seed)
    many = TrainBatches(tokens, context, batch_size, seed)
    expected = np.concatenate([one.batch(step) for step in range(4 * batch_size)])
    assert (np.concatenate([many.batch(step) for step in range(4)]) == expected).all()


def test_order_and_boundaries_change_between_epochs_and_seeds() -> None:
    tokens = np.arange(2001)
    epochs = {
        (seed, epoch): _epoch(TrainBatches(tokens, 20, 1, seed), epoch)
        for seed in (0, 1)
        for epoch in range(4)
    }
    for left, right in itertools.combinations(epochs.values(), 2):
        assert (left[:, 0] == right[:, 0]).mean() < 0.2
    offsets = {key: blocks[:, 0].min() % 20 for key, blocks in epochs.items()}
    assert {offsets[0, 0], offsets[1, 0]} == {0}
    assert len(set(offsets.values())) >= 4
    assert (np.diff(epochs[0, 0][:, 0]) != 20).mean() > 0.9  # shuffled


def test_the_order_is_the_same_on_every_machine_and_numpy() -> None:
    batches = TrainBatches(np.arange(1000), 10, 4, seed=7)
    assert batches.batch(0)[:, 0].tolist() == [510, 140, 960, 120]
    assert batches.batch(30)[:, 0].tolist() == [328, 318, 258, 958]


class _Counting:
    """An array that counts how many tokens are read from it."""

    def __init__(self, length: int) -> None:
        self.array, self.read = np.arange(length), 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: slice) -> np.ndarray[Any, Any]:
        self.read += len(self.array[index])
        return self.array[index]


def test_a_late_step_reads_no_more_than_the_first() -> None:
    reads = []
    for step in (0, 10_000, 10**9):
        tokens = _Counting(5000)
        TrainBatches(tokens, 16, 8, seed=3).batch(step)
        reads.append(tokens.read)
    assert reads == [8 * 17] * 3


def test_a_corpus_shorter_than_a_block_says_what_there_is_and_what_it_takes() -> None:
    expected = r"too short: 128 tokens, but one block of context_length=128 needs 129"
    with pytest.raises(DataError, match=expected):
        TrainBatches(np.zeros(128, np.uint16), 128, 4, 0)
    with pytest.raises(DataError, match=expected):
        ValidationBatches(np.zeros(128, np.uint16), 128, 4, None)
    assert TrainBatches(np.zeros(129, np.uint16), 128, 4, 0).batch(5).shape == (4, 129)


def test_sizes_that_cannot_work_name_the_field() -> None:
    tokens = np.arange(100)
    for field, value in (("context_length", 0), ("batch_size", -1), ("seed", -2)):
        arguments = {"context_length": 5, "batch_size": 2, "seed": 0} | {field: value}
        with pytest.raises(
            ConfigError, match=f"{field}={value} must be a whole number of at least"
        ):
            TrainBatches(tokens, **arguments)
    with pytest.raises(ConfigError, match="step=-1"):
        TrainBatches(tokens, 5, 2, 0).batch(-1)
    with pytest.raises(ConfigError, match="max_tokens=4 is less than one validation block"):
        ValidationBatches(tokens, 5, 2, 4)
    with pytest.raises(ConfigError, match="batch_size=0"):
        ValidationBatches(tokens, 5, 0, None)


@given(sizes, st.integers(0, 500))
@settings(max_examples=80, deadline=None)
def test_validation_is_evenly_spaced_and_independent_of_the_batch_size(
    size: tuple[int, int, int, int], extra: int
) -> None:
    length, context, batch_size, _ = size
    tokens, limit = np.arange(length), context + extra
    batches = ValidationBatches(tokens, context, batch_size, limit)
    blocks = np.concatenate(list(batches))
    assert blocks.dtype == np.int64
    assert len(list(batches)) == len(batches)
    assert batches.tokens == blocks[:, 1:].size <= limit
    assert len(blocks) == min((length - 1) // context, limit // context)
    assert (np.diff(blocks, axis=1) == 1).all()
    gaps = np.diff(blocks[:, 0]) // context
    assert (gaps >= 1).all()
    assert gaps.max(initial=1) - gaps.min(initial=gaps.max(initial=1)) <= 1
    available = (length - 1) // context
    assert blocks[0, 0] == 0
    assert available - blocks[-1, 0] // context <= -(-available // len(blocks))  # up to the end
    one = ValidationBatches(tokens, context, 1, limit)
    assert (np.concatenate(list(one)) == blocks).all()
    assert one.fingerprint == batches.fingerprint


def test_the_validation_fingerprint_is_that_of_its_tokens() -> None:
    tokens = np.arange(100)
    changed = tokens.copy()
    changed[50] = 7
    fingerprints = {
        ValidationBatches(array.astype(kind), 10, 3, limit).fingerprint
        for array, limit, kind in [
            (tokens, None, np.uint16),
            (tokens, None, np.uint32),  # the type on disk doesn't matter
            (changed, None, np.uint16),
            (tokens, 50, np.uint16),
        ]
    }
    assert len(fingerprints) == 3


def test_bytes_are_those_of_the_targets() -> None:
    tokens = np.array([9, 3, 3, 0, 1, 9, 2, 2])
    table = np.arange(10)
    batches = ValidationBatches(tokens, 3, 1, None, byte_table=table)
    assert batches.tokens == 6
    assert batches.bytes == (3 + 3 + 0) + (1 + 9 + 2)
    with pytest.raises(ConfigError, match="byte_table"):
        _ = ValidationBatches(tokens, 3, 1, None).bytes
