"""`polyak rules` and `polyak bench`, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyak import ModelConfig, ops, rules
from polyak.cli.main import main
from polyak.nn.transformer import parameter_count

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "my_rule.py"
Streams = pytest.CaptureFixture[str]


def test_rules_prints_the_whole_family_within_80_columns(capsys: Streams) -> None:
    assert main(["rules"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for name in rules.names():
        assert f"\n{name}" in shown


def test_rules_as_json_counts_what_the_models_hold(capsys: Streams) -> None:
    size = ["--num-layers", "2", "--d-model", "16", "--num-heads", "2", "--vocab-size", "50"]
    names = f"gradient_descent,triple_momentum,{EXAMPLE}:MyRule"
    assert main(["rules", "--rules", names, "--format", "json", *size]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rule["name"] for rule in found] == ["gradient_descent", "triple_momentum", "MyRule"]
    for name, rule in zip(names.split(","), found, strict=True):
        config = ModelConfig(rule=name, num_layers=2, d_model=16, num_heads=2, vocab_size=50)
        assert rule["parameters"] == parameter_count(config)
    assert found[0]["relative_flops"] == 1
    assert found[1]["streams"] == {"v": "embedding"}
    assert found[2]["scalars"] == {"beta": 0.5, "nu": 0.5}


def test_rules_as_markdown_is_a_table(capsys: Streams) -> None:
    assert main(["rules", "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(rules.names())
    assert {line.count(" | ") for line in lines} == {6}


def test_bench_times_models_every_kernel_and_the_loss(tmp_path: Path, capsys: Streams) -> None:
    size = ["--num-layers", "1", "--num-heads", "2", "--d-model", "8", "--context-length", "8"]
    more = ["--rules", "gradient_descent,muon", "--rounds", "2", "--batch-size", "2"]
    out = ["--threads", "1", "--out", str(tmp_path / "bench")]
    assert main(["bench", *size, *more, *out]) == 0
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    names = [row["name"] for row in results["models"]]
    assert names[:2] == ["gradient_descent", "muon"]
    first, second = results["models"][:2]
    assert first["relative_speed"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert first["relative_peak"] == 1.0
    assert second["peak_bytes"] > first["peak_bytes"] > 0
    assert [row["name"] for row in results["ops"]] == [pair.name for pair in ops.PAIRS]
    assert all(row["speed_up"] > 0 for row in results["ops"])
    plain, chunked = results["loss"][:2]
    assert (plain["name"], chunked["name"]) == ("plain", "chunked")
    assert plain["relative_time"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for row in results["loss"]:
        assert max(row["relative_errors"].values()) < 1e-5
        assert row["relative_peak"] == row["peak_bytes"] / plain["peak_bytes"]
    assert results["threads"] == 1
    assert "GPT2LMHeadModel" in names or "GPT2" not in capsys.readouterr().out


def test_bench_times_attention_beside_softmax(tmp_path: Path, capsys: Streams) -> None:
    size = ["--num-heads", "2", "--d-model", "8", "--lengths", "40,20", "--batch-size", "1"]
    words = ["bench", "--what", "attention", *size, "--rounds", "1", "--threads", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["attention"]
    shown = capsys.readouterr().out
    assert {row["tokens"] for row in rows} == {20, 40}
    for row in rows:
        kind, bracket, variant = row["name"].partition("[")
        assert kind in shown
        assert bracket + variant in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_bench_times_generation_beside_gpt2(tmp_path: Path, capsys: Streams) -> None:
    size = ["--num-layers", "1", "--num-heads", "2", "--d-model", "8", "--new-tokens", "5"]
    same = ["bench", "--what", "generate", *size, "--rounds", "2", "--threads", "1"]
    rules = ["--rules", "gradient_descent,triple_momentum"]
    out = ["--context-length", "920", "--out", str(tmp_path)]
    assert main([*same, *rules, *out]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["generate"]
    assert [row["name"] for row in rows[:2]] == ["gradient_descent", "triple_momentum"]
    assert rows[-1]["relative_speed"]["median"] == 1.0 or len(rows) == 2
    for row in rows[:2]:
        assert row["late_over_early"]["low"] > 0
        assert row["tokens_per_second"]["median"] > 0
    capsys.readouterr()
    assert main([*same, *rules, "--context-length", "20"]) == 1
    assert "context_length=20 does not hold a prompt of 16 and new_tokens=5" in (
        capsys.readouterr().err
    )
