"""scripts/compare_folders.py: measurements must be equal; times, machines and paths may differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_folders.py"
RESULTS = {"command": "polyak x", "seconds": 1.5, "runs": [{"loss": 2.5, "folder": "a/run"}]}
MANIFEST = {
    "files": {
        "state.json": {"bytes": 7, "sha256": "aa"},
        "model.safetensors": {"bytes": 4, "sha256": "bb"},
    }
}


def compared(a: Path, b: Path) -> tuple[int, list[str]]:
    run = subprocess.run([sys.executable, SCRIPT, a, b], capture_output=True, text=True)
    assert not run.stderr
    return run.returncode, run.stdout.splitlines()


def written(folder: Path, **changes: Any) -> Path:
    """A folder of results, a log of metrics, weights and a checkpoint, with changes."""
    checkpoint = folder / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    rows = changes.get("rows", [{"step": 1, "loss": 3.0, "tokens_per_second": 10.0}])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps(changes.get("results", RESULTS)))
    (folder / "model.safetensors").write_bytes(changes.get("weights", b"\x00\x01"))
    (checkpoint / "manifest.json").write_text(json.dumps(changes.get("manifest", MANIFEST)))
    (folder / "log.txt").write_text(str(folder))
    return folder


def test_times_machines_and_paths_may_differ(tmp_path: Path):
    other = {
        "command": "polyak y",
        "seconds": 9.0,
        "machine": {"cores": 8},
        "runs": [{"loss": 2.5, "folder": "b/run", "peak_memory_bytes": 7}],
    }
    state = {**MANIFEST["files"], "state.json": {"bytes": 9, "sha256": "cc"}}
    a = written(tmp_path / "a")
    b = written(
        tmp_path / "b",
        results=other,
        rows=[{"step": 1, "loss": 3.0, "tokens_per_second": 99.0}],
        manifest={"files": state},
    )
    assert compared(a, b) == (0, ["equal: 4 files"])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"results": {"runs": [{"loss": 2.5000000000000004}]}},
            "results.json: runs[0].loss: 2.5 in A, 2.5000000000000004 in B",
        ),
        ({"results": {"runs": []}}, "results.json: runs: 1 values in A, 0 in B"),
        ({"results": {"runs": [{}]}}, "results.json: runs[0].loss: only in A"),
        (
            {"rows": [{"step": 1, "loss": 3}]},
            "metrics.jsonl: [0].loss: 3.0 in A, 3 in B",
        ),
        ({"weights": b"\x00\x02"}, "model.safetensors: bytes differ"),
        (
            {"manifest": {"files": {**MANIFEST["files"], "model.safetensors": {"bytes": 5}}}},
            "checkpoints/step-000002/manifest.json: files.model.safetensors.bytes: 4 in A, 5 in B",
        ),
    ],
)
def test_everything_else_must_be_equal(tmp_path: Path, changes: dict[str, Any], line: str):
    code, lines = compared(written(tmp_path / "a"), written(tmp_path / "b", **changes))
    assert code == 1
    assert line in lines


def test_a_file_that_one_folder_lacks_is_a_difference(tmp_path: Path):
    a, b = written(tmp_path / "a"), written(tmp_path / "b")
    (b / "metrics.jsonl").unlink()
    (b / "result.json").write_text("{}")
    assert compared(a, b) == (1, ["metrics.jsonl: only in A", "result.json: only in B"])


def test_folders_that_hold_nothing_are_not_called_equal(tmp_path: Path):
    assert compared(tmp_path, tmp_path) == (2, [f"nothing to compare in {tmp_path}"])
    assert compared(tmp_path, tmp_path / "b") == (2, [f"no such folder: {tmp_path / 'b'}"])
