"""The benchmark of attention times every kind at every chunk size, beside softmax."""

from __future__ import annotations

from polyak.bench.attention import SOFTMAX, attentions

KINDS = ["linear", "momentum", "momentum[recompute]", "adaptive_momentum"]


def test_every_kind_is_timed_at_every_chunk_size_and_compared_with_softmax() -> None:
    rows = attentions(1, 20, 2, 4, rounds=1, chunk_sizes=(4, 8), token_loop=True)
    names = [(row["name"], row["chunk_size"]) for row in rows]
    expected = [(name, size) for size in (4, 8) for name in KINDS]
    assert names == [(SOFTMAX, None), *expected, ("adaptive_momentum[tokens]", None)]
    assert rows[0]["speed_up"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows[0]["relative_peak"] == 1.0
    assert all(row["seconds"]["low"] > 0 and row["peak_bytes"] > 0 for row in rows)
