"""`polyak spectrum`: real runs measured, stopped and gone on with; one line for bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import command, environment, heeding, run_config

from polyak.analysis.jacobian import block_maps
from polyak.cli.main import main
from polyak.evaluation.subjects import load_subject, token_set
from polyak.training.loop import train

Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """Two runs of a few steps, by the training loop itself."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        for rule in ("gradient_descent", "triple_momentum"):
            train(run_config(corpus, rule, steps=4, d_model=8, num_layers=2), folder / rule)
        yield folder


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def test_runs_are_measured_side_by_side(runs: Path, tmp_path: Path, capsys: Streams) -> None:
    out = tmp_path / "out"
    given = [str(runs / "gradient_descent"), str(runs / "triple_momentum")]
    assert main(["spectrum", *given, "--length", "8", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.replace(str(out), "").splitlines())) <= 80
    for text in ("triple_momentum", "(a) x to x", "(b) x and all", "Σ log σ_min", "σ min", "8+8"):
        assert text in said
    results = results_of(out)
    assert (results["kind"], results["status"]) == ("spectrum", "complete")
    page = (out / "report.html").read_text(encoding="utf-8")
    for figure in ("gains-a", "gains-b", "spectra-c"):
        assert f'id="{figure}-title"' in page, figure
    plain, momentum = (run["found"] for run in results["runs"])
    every = {f"0/{block}/{part}" for block in "01" for part in "abc"}
    assert set(momentum) == every | {"0/product/a", "0/product/b"}
    assert set(plain) == {key for key in every if not key.endswith("b")} | {"0/product/a"}
    logs = [momentum[f"0/{block}/b"]["log_sigma_min"]["value"] for block in "01"]
    total = results["runs"][1]["persistence"]["b"]["0"]["total"]
    assert total["value"] == pytest.approx(sum(logs))
    # and it is the Jacobian of the trained model, on the stated tokens
    subject = load_subject(runs / "triple_momentum")
    ids = token_set(subject, tokens=8, length=8).ids[0, :-1]
    dense = block_maps(subject.model, ids)[1].frozen.whole.dense()
    values = torch.linalg.svdvals(dense)
    found = momentum["0/1/a"]
    assert found["sigma_max"]["value"] == pytest.approx(float(values[0]), rel=1e-9)
    assert found["sigma_min"]["value"] == pytest.approx(float(values[-1]), rel=1e-9)


@pytest.mark.slow
def test_a_stopped_command_goes_on_where_it_stopped(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "spectrum",
        str(runs / "triple_momentum"),
        "--sequences",
        "6",
        "--parts",
        "a,b",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command(*words),
        env=environment(runs / "cache"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if (out / "results.json").exists() and results_of(out)["runs"][0].get("found"):
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert error.strip() == "polyak spectrum: interrupted"
    before = results_of(out)
    kept = before["runs"][0]["found"]
    assert before["status"] == "partial"
    assert main([*words]) == 0
    after = results_of(out)
    assert after["status"] == "complete"
    assert len(after["runs"][0]["found"]) == 6 * 4 > len(kept)
    for key, found in kept.items():  # with its seconds: not measured again
        assert after["runs"][0]["found"][key] == found


def test_bad_input_is_one_line(runs: Path, tmp_path: Path, capsys: Streams, corpus: Path) -> None:
    run, out = runs / "gradient_descent", tmp_path / "out"
    corrupt = tmp_path / "corrupt"
    shutil.copytree(run, corrupt)
    (corrupt / "model" / "model.safetensors").write_bytes(b"nothing")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    both = tmp_path / "both"
    train(run_config(corpus, steps=1, d_model=8, causal=False), both)
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text('{"kind": "comparison"}')
    for words, says in (
        ([], "no run is named"),
        ([tmp_path / "missing"], "does not exist"),
        ([corrupt], "is not the file that was written"),
        ([both], "causal"),
        ([run, "--corpus", short], "too short"),
        ([run, "--corpus", "stdlibb"], "did you mean 'stdlib'?"),
        ([run, "--length", "1"], "length=1 must be"),
        ([run, "--length", "999"], "length=999 must be from 1"),
        ([run, "--sequences", "0"], "sequences=0 must be"),
        ([run, "--sequences", "100000"], "ask for fewer"),
        ([run, "--parts", "a,e"], "'e' must be one of a, b, c, d"),
        ([run, "--parts", "d"], "products are of a or b"),
        ([run, "--parts", "c,d"], "products are of a or b"),
        ([run, "--quantiles", "2"], "quantiles=2.0 must be"),
        ([run, "--tolerance", "0"], "tolerance=0.0 must be"),
        ([run, "--out", other], "holds the results of another command (comparison)"),
    ):
        given = ["spectrum", *map(str, words)]
        given += [] if "--out" in words else ["--out", str(out)]
        try:
            code = main(given)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        assert code not in (0, 130)
        assert said.err.startswith("polyak spectrum: ")
        assert says in said.err, said.err
        assert said.err.count("\n") == 1, said.err
        assert not (out / "results.json").exists()
