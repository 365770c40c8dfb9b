"""The benchmark of attention: every kind at every length, at its best chunk, beside softmax."""

from __future__ import annotations

import pytest

from polyak.bench import attention as bench
from polyak.bench.attention import SOFTMAX, attentions
from polyak.bench.timing import interleave

KINDS = ["linear", "momentum", "adaptive_momentum"]


def test_every_kind_is_timed_at_every_length_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "VARIANTS_AT", 20)
    monkeypatch.setattr(bench, "CHOSEN_UP_TO", 20)
    rows = attentions(1, (10, 20, 30), 2, 4, rounds=1, chunk_sizes=(4, 8))
    found = {(row["tokens"], row["name"]): row for row in rows}
    variants = {f"{kind}[recompute]" for kind in KINDS} | {"adaptive_momentum[tokens]"}
    plain = {SOFTMAX, *KINDS}
    for tokens, names in ((10, plain), (20, plain | variants), (30, plain)):
        assert {name for length, name in found if length == tokens} == names
    for (tokens, name), row in found.items():
        assert row["chunk_size"] in (
            (4, 8) if "tokens" not in name and name != SOFTMAX else (None,)
        )
        assert row["seconds"]["low"] > 0
        assert row["peak_bytes"] > 0
        assert (row["growth"] is None) == (tokens == 10 or "[" in name)
    one = {"median": 1.0, "low": 1.0, "high": 1.0}
    for tokens in (10, 20, 30):
        assert found[tokens, SOFTMAX]["speed_up"] == found[tokens, "linear"]["relative_time"] == one
        assert found[tokens, SOFTMAX]["relative_peak"] == 1.0
    for kind in KINDS:  # a longer sequence than those where chunks are chosen takes the last choice
        assert found[30, kind]["chunk_size"] == found[20, kind]["chunk_size"]
    loop, chunks = found[20, "adaptive_momentum[tokens]"], found[20, "adaptive_momentum"]
    ratio = loop["seconds"]["median"] / chunks["seconds"]["median"]
    assert loop["relative_time"]["median"] == pytest.approx(ratio)


def test_a_long_step_is_timed_once() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    assert calls == []
    found = interleave(steps, 3, once=0.0)
    assert calls == ["a", "b"]
    assert all(len(set(seconds)) == 1 and len(seconds) == 3 for seconds in found.values())
    interleave(steps, 3)
    assert calls == ["a", "b"] * 5
