"""Commands on a run whose attention remembers a state, with everything else of its backbone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_config

from polyak.cli.main import main
from polyak.nn.presets import preset_fields
from polyak.training.loop import train

Streams = pytest.CaptureFixture[str]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """A Momentum Transformer of 16 dimensions, its mu learned, and a softmax model."""
    folder = tmp_path_factory.mktemp("runs")
    fields = {**preset_fields("momentum_transformer", 2), "activation_dropout": 0.1}
    fields |= {"attention": "momentum", "attention_options": {"mu_learned": "model"}}
    rule = "residual_momentum@attention+gradient_descent@mlp"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        train(run_config(corpus, rule, steps=4, **fields), folder / "momentum")
        train(run_config(corpus, steps=4), folder / "softmax")
        yield folder


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def test_it_is_evaluated_and_entropy_says_where_it_does_not_apply(
    runs: Path, tmp_path: Path, capsys: Streams
) -> None:
    given = [str(runs / "momentum"), str(runs / "softmax")]
    words = ["--tokens", "256", "--attention-entropy", "--device", "cpu"]
    assert main(["evaluate", *given, *words, "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "momentum: the entropy of attention does not apply: attention=momentum reads" in said
    results = results_of(tmp_path / "out")
    assert results["status"] == "complete"
    first, second = results["runs"]
    assert first["attention"] is None
    assert second["attention"]["layers"]
    assert math.isfinite(first["corpora"][0]["loss"]["value"])


def test_it_writes_and_forgets(runs: Path, tmp_path: Path, corpus: Path, capsys: Streams) -> None:
    words = ["--prompt", "the", "--max-new-tokens", "40", "--device", "cpu"]
    assert main(["generate", str(runs / "momentum"), *words]) == 0  # the context is 16
    words = ["forgetting", str(runs / "momentum"), "--onto", str(corpus), "--steps", "4"]
    words += ["--warmup", "1", "--eval-tokens", "64", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "4 steps of adamw on" in capsys.readouterr().out


def test_it_is_looked_into(runs: Path, tmp_path: Path) -> None:
    run = str(runs / "momentum")
    words = ["--tokens", "64", "--density-probes", "2", "--density-steps", "6", "--top-k", "2"]
    words += ["--max-probes", "20", "--max-products", "80", "--device", "cpu"]
    assert main(["sharpness", run, *words, "--out", str(tmp_path / "sharpness")]) == 0
    assert results_of(tmp_path / "sharpness")["status"] == "complete"
    assert main(["spectrum", run, "--length", "8", "--out", str(tmp_path / "spectrum")]) == 0
    found = results_of(tmp_path / "spectrum")["runs"][0]["found"]
    assert found["0/0/b"]["exact_zeros"] == 8  # x has passed a LayerNorm, and no stream has


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export", "RUN", "OUT/m.pt"], "the released checkpoints have one rule"),
        (["upgrade", "RUN", "OUT/up", "--rule", "heavy_ball"], "can be upgraded; this one is"),
    ],
)
def test_what_is_for_softmax_says_so_in_one_line(
    words: list[str], says: str, runs: Path, tmp_path: Path, capsys: Streams
) -> None:
    given = [w.replace("RUN", str(runs / "momentum")).replace("OUT", str(tmp_path)) for w in words]
    assert main(given) != 0
    said = capsys.readouterr().err.strip()
    assert says in said
    assert len(said.splitlines()) == 1
