"""Parts of a study: kept when whole, found again, refused when asked otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polyak.errors import RunError
from polyak.study.parts import Part, done, expected, measure_all


def _part(kind: str, calls: list[str], **key: Any) -> Part:
    def measure(tick: Any) -> dict[str, Any]:
        calls.append(kind)
        tick(0.5)
        return {"value": key.get("tokens", 1)}

    return Part("runs/a-seed0", kind, {"tokens": 1, **key}, 10.0, measure)


def test_a_stopped_study_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    calls: list[str] = []
    seen: list[tuple[str, Any]] = []
    parts = [_part("one", calls), _part("two", calls), _part("three", calls)]

    def stop(part: Part, found: Any) -> None:
        seen.append((part.kind, found))
        if part.kind == "two":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_all(parts, tmp_path, after_each=stop)
    assert expected(parts, tmp_path) == (3, 2, 10.0)
    shares: list[float] = []
    measure_all(
        parts,
        tmp_path,
        after_each=lambda part, found: seen.append((part.kind, found)),
        progress=lambda share, _: shares.append(share),
    )
    assert calls == ["one", "two", "three"]
    assert [kind for kind, _ in seen] == ["one", "two", "one", "two", "three"]
    assert shares == [0.0, 0.5]
    assert expected(parts, tmp_path) == (3, 3, 0.0)


def test_a_part_that_was_asked_otherwise_is_refused(tmp_path: Path) -> None:
    calls: list[str] = []
    measure_all([_part("one", calls, tokens=5)], tmp_path, after_each=lambda *_: None)
    with pytest.raises(RunError, match=r"tokens: 5 there, 6 now\); choose another --out"):
        done(_part("one", calls, tokens=6), tmp_path)
    assert done(_part("one", calls, tokens=5), tmp_path) == {"value": 5}


def test_a_file_that_is_no_part_is_named(tmp_path: Path) -> None:
    part = _part("one", [])
    part.file(tmp_path).parent.mkdir(parents=True)
    part.file(tmp_path).write_text(json.dumps([1]))
    with pytest.raises(RunError, match="is not a part of a study; remove it"):
        done(part, tmp_path)


def test_a_part_that_was_changed_since_is_refused_with_what_to_do(tmp_path: Path) -> None:
    part = _part("one", [])
    measure_all([part], tmp_path, after_each=lambda *_: None)
    content = json.loads(part.file(tmp_path).read_text())
    for change, says in (
        ({"found": {"value": 7}}, "was changed since it was measured; remove it"),
        ({"found": [7]}, "found must be an object .*remove it"),
        ({"key": "x"}, "key must be an object .*remove it"),
    ):
        part.file(tmp_path).write_text(json.dumps({**content, **change}))
        with pytest.raises(RunError, match=says):
            done(part, tmp_path)
    older = {name: value for name, value in content.items() if name != "sha256"}
    part.file(tmp_path).write_text(json.dumps(older))
    assert done(part, tmp_path) == content["found"]


def test_a_failed_measurement_leaves_no_file(tmp_path: Path) -> None:
    def fail(_: Any) -> dict[str, Any]:
        raise RunError("no")

    part = Part("a", "one", {}, 1.0, fail)
    with pytest.raises(RunError):
        measure_all([part], tmp_path, after_each=lambda *_: None)
    assert not part.file(tmp_path).exists()
