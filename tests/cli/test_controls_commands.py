"""Controls of a model's start and width, from the command line to pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import settings_beside, write_corpus

from polyak import load_run
from polyak.cli.main import main

RULE = "spherical[stream_start=x,embedding_norm=layer,residual_width=24,embedding_reinjection=true]"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def test_a_run_with_controls_is_trained_resumed_reported_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, corpus = str(tmp_path / "run"), str(write_corpus(tmp_path))
    line = ["train", "--rule", RULE, "--corpus", corpus, "--steps", "4", "--out", run]
    line += ["--device", "cpu", *settings_beside([])]
    assert main(line) == 0
    longer = [word if word != "4" else "6" for word in line]
    assert main([*longer, "--resume"]) == 0
    capsys.readouterr()
    other = [word.replace("residual_width=24", "residual_width=32") for word in longer]
    assert main([*other, "--resume"]) != 0
    assert "model.residual_width: 24 there, 32" in capsys.readouterr().err
    rows = [json.loads(text) for text in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    scalars = [row for row in rows if row["kind"] == "validation"][-1]["scalars"]
    assert scalars["reinjection"].keys() == {"layer"}
    model, _ = load_run(run)
    assert model.config.stream_width == 24
    assert main(["report", run, "--out", str(tmp_path / "page")]) == 0
    assert main(["generate", run, "--prompt", "the", "--max-new-tokens", "4"]) == 0
    spectrum = ["spectrum", run, "--length", "5", "--out", str(tmp_path / "spectrum")]
    assert main([*spectrum, "--parts", "a,b"]) == 0
