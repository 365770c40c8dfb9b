"""What older releases wrote is loaded, gone on with, evaluated and drawn by this one, forever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import polyak

from polyak import formats, load_run
from polyak.compare.page import write_report
from polyak.data.prepare import open_prepared, prepare
from polyak.errors import DataError, PolyakError, RunError
from polyak.training.runs.folder import RunFolder

HERE = Path(__file__).parent
RELEASES = sorted(path.name for path in HERE.iterdir() if path.is_dir() and path.name[0].isdigit())
each_release = pytest.mark.parametrize("release", RELEASES)


@pytest.fixture
def kept(release: str, tmp_path: Path) -> Path:
    """A copy of what a release wrote."""
    return Path(shutil.copytree(HERE / release, tmp_path / release))


def done(kept: Path, *words: object) -> str:
    found = polyak(*words, cwd=kept, cache=kept / "cache")
    assert (found.returncode, found.stderr) == (0, ""), found
    return found.stdout


def losses(run: Path) -> list[tuple[str, int, float]]:
    rows = RunFolder(run).metrics()
    return [(row["kind"], row["step"], row["loss"]) for row in rows if "loss" in row]


@each_release
def test_its_run_loads(kept: Path) -> None:
    model, tokenizer = load_run(kept / "run")
    assert tokenizer.name == "bytes"
    assert model.config.rule == "triple_momentum"
    assert sum(p.numel() for p in model.parameters()) == 2992


@each_release
def test_its_run_goes_on_as_the_release_itself_went_on(kept: Path) -> None:
    before, ended = losses(kept / "run"), json.loads((kept / "run/result.json").read_text())
    shutil.rmtree(kept / "run/checkpoints/step-000006")
    (kept / "run/result.json").unlink()
    done(kept, "train", "--out", "run", "--resume")
    after = losses(kept / "run")
    assert [row[:2] for row in after] == [row[:2] for row in before]
    np.testing.assert_allclose([row[2] for row in after], [row[2] for row in before], rtol=1e-5)
    again = json.loads((kept / "run/result.json").read_text())
    assert again["loss"] == pytest.approx(ended["loss"], rel=1e-5)
    done(kept, "train", "--out", "run", "--resume", "--steps", 8)
    assert losses(kept / "run")[-1][1] == 8


@pytest.mark.slow
@each_release
def test_its_run_is_evaluated_on_the_tokens_that_it_was_validated_on(kept: Path) -> None:
    done(kept, "evaluate", "run", "--tokens", 128, "--out", "losses")
    found = json.loads((kept / "losses/results.json").read_text())
    ended = json.loads((kept / "run/result.json").read_text())
    loss = found["runs"][0]["corpora"][0]["loss"]["value"]
    assert loss == pytest.approx(ended["loss"], rel=1e-5)


@pytest.mark.slow
@each_release
def test_its_run_keeps_its_split_also_where_the_whole_line_is_repeated(kept: Path) -> None:
    recorded = RunFolder(kept / "run").recorded()
    assert recorded["config"]["split"] == 1
    data = prepare(str(kept / "texts.jsonl"), cache=kept / "cache", split=1)
    assert data.fingerprint == recorded["settings"]["corpus"]["fingerprint"]
    settings = (
        *("model.num_layers=1", "model.num_heads=2", "model.d_model=8", "model.context_length=16"),
        *("training.batch_size=4", "training.eval_tokens=128", "threads=1"),
        *("training.checkpoint_every=4", "training.eval_every=2", "training.keep_checkpoints=2"),
    )
    line = ["train", "--rule", "triple_momentum[stream_start=zeros]", "--corpus", "texts.jsonl"]
    line += [word for setting in settings for word in ("--set", setting)]
    line += ["--device", "cpu", "--steps", "8", "--out", "run", "--resume"]
    done(kept, *line)
    refused = polyak(*line, "--set", "split=2", cwd=kept, cache=kept / "cache")
    assert refused.returncode == 1
    assert "split" in refused.stderr


@pytest.mark.slow
@each_release
def test_its_run_is_drawn(kept: Path) -> None:
    done(kept, "report", "run", "--out", "page")
    found = json.loads((kept / "page/results.json").read_text())
    assert found["runs"][0]["step"] == 6
    assert "triple_momentum" in (kept / "page/report.html").read_text()


@each_release
def test_its_comparison_is_drawn(kept: Path) -> None:
    found = formats.read_results(kept / "comparison/results.json", "comparison")
    write_report(found, kept)
    page = (kept / "report.html").read_text()
    assert all(f"{entry['loss']['mean']:.4f}" in page for entry in found["entries"])


@each_release
def test_its_prepared_corpus_opens(kept: Path) -> None:
    data = open_prepared(kept / "prepared")
    assert (len(data.train), len(data.validation)) == (11_399, 298)


# The place where older formats are brought up to date


def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "settings": content["old_settings"]}

    def counted(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "count": len(content["settings"])}

    monkeypatch.setitem(formats.UPGRADES, "run", (renamed, counted))


def test_an_older_format_is_brought_up_to_date_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_steps(monkeypatch)
    file = tmp_path / "run.json"
    for content in (
        {"format": 1, "old_settings": {"a": 1}},
        {"format": 2, "settings": {"a": 1}},
        {"format": 3, "settings": {"a": 1}, "count": 1},
    ):
        file.write_text(json.dumps(content))
        found = RunFolder(tmp_path).recorded()
        assert (found["format"], found["settings"], found["count"]) == (3, {"a": 1}, 1)
    assert formats.current("run") == 3


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("run", "run/run.json"),
        ("checkpoint", "run/checkpoints/step-000006/manifest.json"),
        ("prepared", "prepared/manifest.json"),
        ("tokenizer", "run/model/polyak_tokenizer.json"),
        ("comparison", "comparison/results.json"),
    ],
)
def test_a_newer_format_is_refused_in_one_line(kind: str, file: str, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(HERE / RELEASES[-1], tmp_path / "kept"))
    content = json.loads((kept / file).read_text())
    (kept / file).write_text(json.dumps({**content, "format": formats.current(kind) + 1}))
    line = f"{kept / file} has format {formats.current(kind) + 1}, this polyak reads up to "
    with pytest.raises(PolyakError) as caught:
        open_any(kind, kept)
    assert str(caught.value).startswith(line)
    assert str(caught.value).endswith("; upgrade polyak")
    for wrong in (None, "1", True, 0, 1.0):
        (kept / file).write_text(json.dumps({**content, "format": wrong}))
        with pytest.raises(PolyakError, match=r"is not .*format="):
            open_any(kind, kept)


def open_any(kind: str, kept: Path) -> None:
    if kind == "run":
        load_run(kept / "run")
    elif kind == "checkpoint":
        formats.read(kept / "run/checkpoints/step-000006/manifest.json", kind)
    elif kind == "prepared":
        open_prepared(kept / "prepared")
    elif kind == "tokenizer":
        load_run(kept / "run")
    else:
        formats.read_results(kept / "comparison/results.json")


def test_what_is_no_file_of_polyak_is_said(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for text, line in (("[]", "is not a"), ("{}", "format=None"), ("{", "not valid")):
        file.write_text(text)
        with pytest.raises(RunError, match=line):
            formats.read(file, "run")
        with pytest.raises(DataError, match=line):
            formats.read(file, "prepared", error=DataError)
    file.write_text('{"format": 1, "kind": "else"}')
    with pytest.raises(RunError, match="holds no results: its kind is 'else'"):
        formats.read_results(file)
