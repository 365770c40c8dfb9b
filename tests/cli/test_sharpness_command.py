"""`polyak sharpness`: real runs measured, stopped and gone on with; one line for bad input."""

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

from polyak.analysis.hessian import Surface, dense
from polyak.cli.main import main
from polyak.evaluation.subjects import load_subject, token_set
from polyak.report.tables import as_text
from polyak.study.sharpness.page import tables
from polyak.training.loop import train

Streams = pytest.CaptureFixture[str]
SMALL = {"tokens": 64, "density-probes": 2, "density-steps": 6, "top-k": 2}
SMALL |= {"max-probes": 20, "max-products": 80}


def small(**other: object) -> list[str]:
    """Options of a small measurement, some of them others."""
    chosen = SMALL | {name.replace("_", "-"): value for name, value in other.items()}
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """Two runs of a few steps, by the training loop itself."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        for rule in ("gradient_descent", "triple_momentum"):
            train(run_config(corpus, rule, steps=4, d_model=8), folder / rule)
        yield folder


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def test_runs_are_measured_side_by_side(runs: Path, tmp_path: Path, capsys: Streams) -> None:
    out = tmp_path / "out"
    words = [*small(), "--groups", "--gauss-newton", "--rho", "0.05", "--rho", "0.5"]
    given = [str(runs / "gradient_descent"), str(runs / "triple_momentum")]
    assert main(["sharpness", *given, *words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.replace(str(out), "").splitlines())) <= 80
    for text in ("gradient_descent", "triple_momentum", "λ max", "trace/N", "ρ = 0.5", " ± "):
        assert text in said
    results = results_of(out)
    assert (results["kind"], results["status"]) == ("sharpness", "complete")
    page = (out / "report.html").read_text(encoding="utf-8")
    for figure in ("density-whole", "lines", "plane-0", "plane-1"):
        assert f'id="{figure}-title"' in page, figure
    assert "By parameter group" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for run in results["runs"]:
        found = run["found"]
        assert {"loss", "spectrum", "density", "rise", "slices", "scaled", "gauss_newton"} <= set(
            found
        )
        assert ("group streams" in found) == (run["rule"] == "triple_momentum")
        assert run["tokens"]["count"] == 64
        assert found["rise"]["rises"][1]["at_least"] > found["rise"]["rises"][0]["at_least"] > 0
        middle = found["slices"]["line"]["losses"][0][10]
        assert middle == pytest.approx(found["loss"]["value"], abs=1e-6)
    assert len(as_text(tables(results)).splitlines()) > 8


def test_the_same_seed_gives_the_same_numbers(runs: Path, tmp_path: Path) -> None:
    words = [str(runs / "gradient_descent"), *small(max_products=400, top_k=1)]
    words += ["--dtype", "float64", "--tolerance", "1e-7", "--slice-radius", "0", "--scale", "none"]
    for out, seed in (("one", "0"), ("two", "0"), ("other", "1")):
        assert main(["sharpness", *words, "--seed", seed, "--out", str(tmp_path / out)]) == 0
    one, two, other = (
        results_of(tmp_path / out)["runs"][0]["found"] for out in ("one", "two", "other")
    )
    for found in (one, two, other):
        found["spectrum"].pop("peak_memory_bytes")
        for part in found.values():
            part.pop("seconds")
    assert one == two
    assert one["density"] != other["density"]
    for end in ("top", "bottom"):
        for pair, again in zip(one["spectrum"][end], other["spectrum"][end], strict=True):
            assert pair["converged"]
            assert pair["residual"] <= one["spectrum"]["tolerance"]
            assert pair["value"] == pytest.approx(again["value"], abs=1e-6)


def test_a_group_is_the_dense_block(runs: Path, tmp_path: Path) -> None:
    words = [str(runs / "triple_momentum"), *small(density_probes=0), "--dtype", "float64"]
    words += ["--groups", "--slice-radius", "0", "--scale", "none"]
    assert main(["sharpness", *words, "--out", str(tmp_path / "out")]) == 0
    found = results_of(tmp_path / "out")["runs"][0]["found"]
    assert not {"density", "slices", "scaled"} & set(found)
    subject = load_subject(runs / "triple_momentum")
    names = [name for name, _ in subject.model.named_parameters() if name.endswith("_raw")]
    surface = Surface(subject.model, token_set(subject, tokens=64).ids, names, dtype=torch.float64)
    values = torch.linalg.eigvalsh(dense(surface.hessian, surface.size))
    part = found["group scalars"]
    assert part["parameters"] == len(values)
    assert part["top"][0]["value"] == pytest.approx(float(values[-1]), rel=1e-9)
    assert part["bottom"][0]["value"] == pytest.approx(float(values[0]), rel=1e-9)
    assert part["trace"]["deflated"]["value"] == pytest.approx(float(values.sum()), rel=0.05)


@pytest.mark.slow
def test_a_stopped_command_goes_on_where_it_stopped(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["sharpness", str(runs / "gradient_descent"), "--out", str(out)]
    long = [*words, *small(density_steps=60, density_probes=400)]
    process = subprocess.Popen(
        command(*long),
        env=environment(runs / "cache"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if (out / "results.json").exists():
                found = results_of(out)["runs"][0].get("found", {})
                if found.get("density", {}).get("probes", 0) >= 2:
                    break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip() == "polyak sharpness: interrupted"
    before = results_of(out)
    found = before["runs"][0]["found"]
    assert before["status"] == "partial"
    assert found["density"]["status"] == "partial"
    # as if fewer had been asked for, so that this test ends
    before["settings"]["density_probes"] = found["density"]["probes"] + 1
    (out / "results.json").write_text(json.dumps(before))
    probes = found["density"]["probes"] + 1
    assert main([*words, *small(density_steps=60, density_probes=probes)]) == 0
    after = results_of(out)["runs"][0]["found"]
    assert results_of(out)["status"] == "complete"
    assert after["spectrum"] == found["spectrum"]  # with its seconds: not measured again
    assert after["density"]["nodes"][:-1] == found["density"]["nodes"]


def test_bad_input_is_one_line(runs: Path, tmp_path: Path, capsys: Streams, corpus: Path) -> None:
    run, out = runs / "gradient_descent", tmp_path / "out"
    corrupt = tmp_path / "corrupt"
    shutil.copytree(run, corrupt)
    (corrupt / "model" / "model.safetensors").write_bytes(b"nothing")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "result.json").unlink()
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
        ([unfinished], "did not finish"),
        ([both], "causal"),
        ([run, "--corpus", short], "too short"),
        ([run, "--corpus", "stdlibb"], "did you mean 'stdlib'?"),
        ([run, "--tokens", "0"], "tokens=0 must be"),
        ([run, "--tokens", "3"], "tokens=3 is less than one block"),
        ([run, "--top-k", "0"], "top_k=0 must be"),
        ([run, "--rho", "0"], "rho=0.0 must be"),
        ([run, "--trace-precision", "0"], "trace_precision=0.0 must be"),
        ([run, "--scale", "rows"], "--scale"),
        ([run, "--out", other], "holds the results of another command (comparison)"),
    ):
        given = ["sharpness", *map(str, words)]
        given += [] if "--out" in words else ["--out", str(out)]
        try:
            code = main(given)
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        assert code not in (0, 130)
        assert said.err.startswith("polyak sharpness: ")
        assert says in said.err, said.err
        assert said.err.count("\n") == 1, said.err
        assert not (out / "results.json").exists()


def test_other_settings_in_the_same_folder_are_refused(
    runs: Path, tmp_path: Path, capsys: Streams
) -> None:
    out = tmp_path / "out"
    words = ["sharpness", str(runs / "gradient_descent"), "--tokens", "64", "--out", str(out)]
    words += ["--density-probes", "0", "--slice-radius", "0", "--scale", "none"]
    assert main([*words, "--top-k", "1"]) == 0
    capsys.readouterr()
    assert main([*words, "--top-k", "2"]) == 1
    assert "made with other settings (top_k: 1 there, 2 now)" in capsys.readouterr().err
