"""Several rules in one model, from the command line to pages and shared folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import SETTINGS, polyak, settings_beside, write_corpus

from polyak import load_run
from polyak.cli.main import main
from polyak.interop.card import model_card

RULE = "residual_momentum[mu=0.9]@attention+triple_momentum@mlp"
MINE = """
from polyak.rules import Stream, UpdateRule, unit_interval

class Mine(UpdateRule):
    streams = (Stream("m", start="zeros"),)
    beta = unit_interval(0.5)

    def step(self, x, state, oracle):
        m = self.beta * state.m + oracle(x)
        return x + m, state.replace(m=m)

class Other(UpdateRule):
    def step(self, x, state, oracle):
        return x + oracle(x) / 2, state
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def words(folder: Path, *more: object) -> list[str]:
    given = ["--corpus", write_corpus(folder), "--steps", 4, "--device", "cpu", *more]
    return ["train", *map(str, given), *settings_beside(more)]


def test_a_run_of_several_rules_is_trained_resumed_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = words(tmp_path, "--rule", "adam@1.attention+triple_momentum@mlp", "--out", run)
    assert main(line) == 0
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    scalars = [row for row in rows if row["kind"] == "validation"][-1]["scalars"]
    assert scalars["beta1"].keys() == {"attention"}
    assert scalars["mu"].keys() == {"mlp"}
    longer = [word if word != "4" else "6" for word in line]
    assert main([*longer, "--resume"]) == 0
    model, _ = load_run(run)
    assert model.config.rule == "adam@1.attention+triple_momentum@mlp"
    assert main(["report", str(run), "--out", str(tmp_path / "page")]) == 0
    assert "adam@1.attention+triple_momentum@mlp" in (tmp_path / "page/results.json").read_text()
    capsys.readouterr()
    other = [word.replace("adam@1.attention", "soap@1.attention") for word in longer]
    assert main([*other, "--resume"]) != 0
    error = capsys.readouterr().err
    assert "model.rule: 'adam@1.attention+triple_momentum@mlp' there, 'soap@1.attention+" in error
    # training may freeze what it does not change, and nothing else
    for rule, code in (("adam[frozen=beta1]", 0), ("adam[beta1=0.2]", 1)):
        text = f"{rule}@1.attention+triple_momentum@mlp"
        on = words(tmp_path, "--init", run, "--rule", text, "--out", tmp_path / rule)
        assert (main(on) != 0) == code
    frozen, _ = load_run(tmp_path / "adam[frozen=beta1]")
    assert not frozen.blocks[0].rules["attention"].beta1_raw.requires_grad  # type: ignore[index,union-attr]


@pytest.mark.slow
def test_a_users_files_in_parts_are_kept_and_need_the_word(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    rule = f"{file}:Mine[beta=0.25]@attention+{file}:Other@mlp"
    run = tmp_path / "run"
    assert main(words(tmp_path, "--rule", rule, "--out", run)) == 0
    file.unlink()
    model, _ = load_run(run)
    parts = [placed.part for placed in model.placement.parts]
    assert [Path(part.rule.rpartition(":")[0]).is_relative_to(run) for part in parts] == [True] * 2
    assert model.placement.name == "Mine[beta=0.25]@attention+Other@mlp"
    written = json.loads((run / "model/config.json").read_text())["polyak"]["rule"]
    assert str(tmp_path) not in written
    assert written.count("code/") == 2
    shutil.copytree(run, tmp_path / "elsewhere")
    given = {"cwd": tmp_path, "cache": tmp_path / "cache", "POLYAK_CONFIG": str(tmp_path / "them")}
    line = ["generate", tmp_path / "elsewhere", "--prompt", "the", "--max-new-tokens", 2]
    refused = polyak(*line, **given)
    assert refused.returncode != 0
    assert "brings code of its own that was not made here: class Mine" in refused.stderr
    assert polyak(*line, "--trust-code", **given).returncode == 0


def test_hugging_face_loads_and_generates(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("polyak.interop.huggingface")
    run = tmp_path / "run"
    assert (
        main(words(tmp_path, "--rule", RULE, "--set", "model.stream_start=zeros", "--out", run))
        == 0
    )
    plain, _ = load_run(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.rule == RULE
    ids = torch.randint(256, (2, 5))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids))
        made = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        again = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, again)
    model.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(saved(ids).logits, plain(ids))
    assert "rule | `residual_momentum[mu=0.9]@attention+" in model_card(run)


@pytest.mark.slow
def test_a_comparison_splits_its_entries_outside_of_brackets(tmp_path: Path) -> None:
    rules = (
        "gradient_descent,heavy_ball[beta=0.3,state_norm=none]@1.attention+gradient_descent,"
        "residual_momentum@attention+gradient_descent[tie_embeddings=false]@mlp"
    )
    line = ["compare", "--rules", rules, "--corpus", str(write_corpus(tmp_path)), "--seeds", "2"]
    line += ["--steps", "4", "--out", str(tmp_path / "out"), *SETTINGS]
    assert main(line) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    names = [entry["name"] for entry in results["entries"]]
    assert names == [
        "gradient_descent",
        "heavy_ball[beta=0.3,state_norm=none]@1.attention+gradient_descent",
        "residual_momentum@attention+gradient_descent[tie_embeddings=false]@mlp",
    ]
    entry = results["entries"][2]
    assert entry["model"]["tie_embeddings"] is False
    assert entry["rule"] == "residual_momentum@attention+gradient_descent@mlp"
    assert entry["equation"] == "attention: v ← μv − O(x); x ← x − sv · mlp: x ← x + O(x)"
    assert "residual_momentum@attention" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("residual_momentum@attention", "takes mlp of layer 1; add one without a place"),
        ("nesterov@1-6+adam", "nesterov@1-6: layers run from 1 to 1 in this model"),
        ("nesterov@1+adam[mu=2]@attention", "unknown field or option in"),
        ("nesterov@mpl+adam", "there is no place 'mpl'"),
        ("nesterov@attention[mu=0.3]+adam", "write rule or rule[key=value,...], or several with"),
    ],
)
def test_a_wrong_place_is_one_line(
    rule: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path, "--rule", rule, "--out", tmp_path / "run")) != 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_released_files_have_one_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    rule = "triple_momentum@attention+gradient_descent@mlp"
    assert main(words(tmp_path, "--rule", rule, "--out", run)) == 0
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "released.pt")]) != 0
    assert f"have one rule everywhere; this model has {rule}" in capsys.readouterr().err
    assert main(["import", str(run / "model"), str(tmp_path / "in"), "--rule", rule]) != 0
