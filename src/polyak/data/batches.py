"""Batches: which tokens are seen at which step, as a pure function of seed and step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256
from typing import cast

import numpy as np
import numpy.typing as npt

from polyak.checks import check_whole
from polyak.data.shards import Tokens
from polyak.errors import ConfigError, DataError

Batch = npt.NDArray[np.int64]


class TrainBatches:
    r"""Shuffled blocks of training tokens, epoch after epoch.

    The N tokens are read as a ring, cut at an offset \(o_e\) into \(n = \lfloor (N-1)/T \rfloor\)
    non-overlapping blocks of T targets: block i of epoch e holds the T + 1 tokens from
    \(o_e + iT\) (modulo N), the first of which is an input only. Every block of an epoch is used
    once, in an order drawn anew, before the next epoch begins; a batch may straddle two epochs.
    \(o_0 = 0\); later offsets are drawn from 0…T−1, so the block boundaries move. The ring makes
    the number of blocks the same in every epoch, so a step's epoch needs no history. The seam
    is like any other place where one document follows another: the text before it ends with
    the end-of-text token.

    The draws come from Philox, keyed by (seed, epoch), as raw bits that NumPy keeps stable across
    versions. The order of the current epoch is kept as a cache: 4 bytes per block (8 million
    blocks for 9 billion tokens at T = 1024: 34 MiB kept, about 170 MiB and two seconds while it
    is drawn, once an epoch).

    Args:
        tokens: Token ids, an array or `Prepared.train`.
        context_length: T, targets per sequence.
        batch_size: Sequences per step.
        seed: Any non-negative integer.

    Raises:
        ConfigError: `context_length` or `batch_size` below 1, or a negative seed.
        DataError: fewer than T + 1 tokens.
    """

    def __init__(self, tokens: Tokens, context_length: int, batch_size: int, seed: int) -> None:
        check_whole("context_length", context_length)
        check_whole("batch_size", batch_size)
        check_whole("seed", seed, 0)
        _check_length(tokens, context_length)
        self._tokens = tokens
        self.context_length, self.batch_size, self.seed = context_length, batch_size, seed
        self.blocks_per_epoch = (len(tokens) - 1) // context_length
        self._orders: OrderedDict[int, tuple[int, npt.NDArray[np.unsignedinteger]]] = OrderedDict()

    def batch(self, step: int) -> Batch:
        """The sequences of a step (counted from 0), int64 of shape (batch_size, T + 1).

        Inputs are `[:, :-1]`, targets `[:, 1:]`. Steps can be asked for in any order.
        """
        check_whole("step", step, 0)
        result = np.empty((self.batch_size, self.context_length + 1), dtype=np.int64)
        first = step * self.batch_size
        for row in range(self.batch_size):
            epoch, position = divmod(first + row, self.blocks_per_epoch)
            offset, order = self._order(epoch)
            result[row] = self._block(offset + int(order[position]) * self.context_length)
        return result

    def _block(self, start: int) -> npt.NDArray[np.integer]:
        block = self._tokens[start : start + self.context_length + 1]
        # An offset below T keeps every start inside the file; only the end can pass the seam.
        if missing := self.context_length + 1 - len(block):
            block = np.concatenate([block, self._tokens[:missing]])
        return cast(npt.NDArray[np.integer], block)

    def _order(self, epoch: int) -> tuple[int, npt.NDArray[np.unsignedinteger]]:
        if epoch not in self._orders:
            bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            draws = bits.random_raw(self.blocks_per_epoch + 1)
            offset = int(draws[0] % np.uint64(self.context_length)) if epoch else 0
            order = np.argsort(draws[1:], kind="stable")
            small = np.uint32 if self.blocks_per_epoch <= 1 << 32 else np.uint64
            self._orders[epoch] = offset, order.astype(small)
            if len(self._orders) > 2:  # two, for batches that straddle
                self._orders.popitem(last=False)
        return self._orders[epoch]


class ValidationBatches:
    """The one fixed validation set: evenly spaced, non-overlapping blocks.

    Of the (N − 1) // T blocks that begin at multiples of T, `max_tokens` // T (all, if there are
    fewer) are taken at even distances, in order of position. Nothing about them depends on a
    seed, and the batch size only groups them. Iterating yields int64 arrays of shape (b, T + 1)
    with b = `batch_size`, less in the last.

    Attributes:
        tokens: Number of targets.
        fingerprint: SHA-256 of the blocks.

    Args:
        tokens: Token ids, an array or `Prepared.validation`.
        context_length: T, targets per sequence.
        batch_size: Sequences per batch.
        max_tokens: At most this many targets; None for all there are.
        byte_table: Bytes of text per token id; taken from `tokens` if that is a `TokenFile`.

    Raises:
        ConfigError: a size below 1, or `max_tokens` less than one block.
        DataError: fewer than T + 1 tokens.
    """

    def __init__(
        self,
        tokens: Tokens,
        context_length: int,
        batch_size: int,
        max_tokens: int | None,
        *,
        byte_table: npt.NDArray[np.int64] | None = None,
    ) -> None:
        check_whole("context_length", context_length)
        check_whole("batch_size", batch_size)
        if max_tokens is not None and max_tokens < context_length:
            raise ConfigError(
                f"max_tokens={max_tokens} is less than one validation block; use at least "
                f"context_length={context_length}"
            )
        _check_length(tokens, context_length)
        available = (len(tokens) - 1) // context_length
        count = available if max_tokens is None else min(available, max_tokens // context_length)
        self._source, self._context_length, self._batch_size = tokens, context_length, batch_size
        self._starts = [i * available // count * context_length for i in range(count)]
        self._byte_table = getattr(tokens, "byte_table", None) if byte_table is None else byte_table
        self.tokens = count * context_length
        digest = sha256(f"validation {context_length} {count}".encode())
        text_bytes = 0
        for batch in self:
            digest.update(batch.astype("<i8").tobytes())
            if self._byte_table is not None:
                text_bytes += int(self._byte_table[batch[:, 1:]].sum())
        self.fingerprint = digest.hexdigest()
        self._bytes = text_bytes

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Where each block begins: the place of its first input token, in order."""
        return np.asarray(self._starts, dtype=np.int64)

    @property
    def bytes(self) -> int:
        """Bytes of text that all targets stand for, the denominator of bits per byte."""
        if self._byte_table is None:
            raise ConfigError(
                "bytes of text are unknown for bare token ids; give ValidationBatches a "
                "byte_table (Tokenizer.byte_table) or a TokenFile"
            )
        return self._bytes

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._starts), self._batch_size):
            starts = self._starts[first : first + self._batch_size]
            blocks = [self._source[start : start + self._context_length + 1] for start in starts]
            yield np.stack(blocks).astype(np.int64)


def _check_length(tokens: Tokens, context_length: int) -> None:
    if len(tokens) <= context_length:
        label = getattr(tokens, "label", "the corpus")
        raise DataError(
            f"{label} is too short: {len(tokens)} tokens, but one block of "
            f"context_length={context_length} needs {context_length + 1}; use more text or a "
            "smaller context_length"
        )
