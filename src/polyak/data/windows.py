r"""Which documents share text, told by their windows: every 200 consecutive bytes of UTF-8.

A window's hash is Σ t[bᵢ]·B^(n−1−i) mod 2⁶⁴ over its bytes, with a table t of 256 odd numbers and
an odd B, mixed afterwards (Steele, Lea and Flood 2014). With cᵢ = t[bᵢ]·B^(−i) and its running
sums S, a window from i on is B^(i+n−1)·(S[i+n] − S[i]): sums, not a loop. Two windows of
different text have one hash with a probability of about 2⁻⁶⁴.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from polyak.data.documents import Text, parts_of

WINDOW = 200
"""Bytes of a window."""
LIMIT = 1 << 22
"""Windows kept in memory at most; of more, an equal share of every document's is kept."""

Hashes = npt.NDArray[np.uint64]

_BLOCK = 1 << 16  # windows hashed at once: what is calculated with them stays in the cache
_FILTER = 25  # bits of a hash that the first look-up uses
_BASE = 0x9E3779B97F4A7C15


def _powers(base: int) -> Hashes:
    found = np.full(_BLOCK + WINDOW, base, np.uint64)
    found[0] = 1
    with np.errstate(over="ignore"):
        powers: Hashes = np.multiply.accumulate(found)
    return powers


_UP, _DOWN = _powers(_BASE), _powers(pow(_BASE, -1, 1 << 64))
_TABLE = np.random.Generator(np.random.PCG64(200)).integers(0, 1 << 63, 256, np.uint64) * 2 + 1


def hashes(text: Text) -> Iterator[Hashes]:
    """The hash of every window of a text, in order; a shorter text is one window."""
    kept, whole = b"", False
    for part in parts_of(text):
        data = kept + part.encode("utf-8", "surrogatepass")
        for start in range(0, len(data) - WINDOW + 1, _BLOCK):
            yield _hash(np.frombuffer(data[start : start + _BLOCK + WINDOW - 1], np.uint8))
            whole = True
        kept = data[max(0, len(data) - WINDOW + 1) :]
    if not whole and kept:
        yield _hash(np.frombuffer(kept.ljust(WINDOW, b"\0"), np.uint8))


def _hash(data: npt.NDArray[np.uint8]) -> Hashes:
    count = len(data) - WINDOW + 1
    with np.errstate(over="ignore"):
        sums = np.zeros(len(data) + 1, np.uint64)
        np.cumsum(_TABLE[data] * _DOWN[: len(data)], out=sums[1:])
        found: Hashes = (sums[WINDOW:] - sums[:count]) * _UP[WINDOW - 1 : WINDOW - 1 + count]
        found ^= found >> np.uint64(30)
        found *= np.uint64(0xBF58476D1CE4E5B9)
        found ^= found >> np.uint64(27)
        found *= np.uint64(0x94D049BB133111EB)
        found ^= found >> np.uint64(31)
    return found


class Shared:
    """Windows of some documents, and which of them occur elsewhere.

    First every document is given to `keep`, then other text to `meet`. Memory is bounded, however
    much text either gets: beyond `limit` windows, of each document only those whose hash is a
    multiple of 2, 4, 8, … are kept, and the one with the least hash in any case.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._step, self._count = limit, 1, 0
        self._kept: list[Hashes] = []
        self._known: Hashes | None = None

    @property
    def exact(self) -> bool:
        """Whether every window was kept."""
        return self._step == 1

    def keep(self, text: Text) -> None:
        """Take in a document; it gets the next number, from 0 on."""
        assert self._known is None, "all documents are kept before other text is met"
        found = [self._thinned(block) for block in hashes(text)]
        self._kept.append(np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64))
        self._count += len(self._kept[-1])
        while self._count > self._limit and self._count > 2 * len(self._kept):
            self._step *= 2
            self._kept = [self._thinned(each) for each in self._kept]
            self._count = sum(map(len, self._kept))

    def _thinned(self, found: Hashes) -> Hashes:
        if self._step == 1 or not len(found):
            return found
        chosen = found % np.uint64(self._step) == 0
        chosen[found.argmin()] = True
        thinned: Hashes = found[chosen]
        return thinned

    def meet(self, text: Text) -> None:
        """Look for the kept windows in other text."""
        if self._known is None:
            self._known = np.unique(np.concatenate([np.empty(0, np.uint64), *self._kept]))
            self._met = np.zeros(len(self._known), bool)
            self._maybe = np.zeros(1 << _FILTER, bool)
            self._maybe[self._known >> np.uint64(64 - _FILTER)] = True
        if not len(self._known):
            return
        for block in hashes(text):
            block = block[self._maybe[block >> np.uint64(64 - _FILTER)]]
            place = np.searchsorted(self._known, block)
            place[place == len(self._known)] = 0
            self._met[place[self._known[place] == block]] = True

    def shares(self) -> list[float]:
        """Of each kept document, the share of its distinct windows that were met."""
        if self._known is None:
            return [0.0] * len(self._kept)
        places = (np.searchsorted(self._known, kept) for kept in self._kept)
        return [float(self._met[place].mean()) if len(place) else 0.0 for place in places]
