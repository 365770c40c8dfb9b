"""The README's rule of one's own: a file anywhere, one command, and everything works with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import SETTINGS, polyak, write_corpus

from polyak import ModelConfig, Transformer, load_run
from polyak.files import sha256_of
from polyak.nn.cost import cost
from polyak.rules import get

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "my_rule.py"


def test_the_example_is_short_and_complete() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 15
    rule = get(f"{EXAMPLE}:MyRule")
    assert rule.name == "MyRule"
    assert rule.scalars.keys() == {"beta", "nu"}


def test_the_example_without_velocity_is_gradient_descent() -> None:
    size = {"num_layers": 3, "num_heads": 2, "d_model": 8, "context_length": 6}
    plain = Transformer(ModelConfig(**size))
    for nu, expected in ((1e-6, True), (0.5, False)):
        own = Transformer(
            ModelConfig(rule=f"{EXAMPLE}:MyRule", **size, rule_options={"nu": nu, "beta": 0.5})
        )
        own.load_state_dict(plain.state_dict(), strict=False)
        ids = torch.arange(6)[None]
        with torch.no_grad():
            assert torch.allclose(own(ids), plain(ids), atol=1e-5) is expected


@pytest.mark.slow
def test_a_rule_of_ones_own_is_compared_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "rules").mkdir(parents=True)
    shutil.copy(EXAMPLE, home / "rules" / "my_rule.py")
    write_corpus(home)
    (home / "json.py").write_text("raise ImportError('a file that happens to lie here')\n")
    done = polyak(
        *("compare", "--rules", "gradient_descent,rules/my_rule.py:MyRule[beta=0.8]"),
        *("--corpus", "corpus.txt", "--out", "out", "--steps", 4, "--seeds", 1, *SETTINGS),
        cwd=home,
        cache=tmp_path / "cache",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "MyRule" in done.stdout
    results = json.loads((home / "out" / "results.json").read_text())
    plain, own = results["entries"]
    assert own["name"] == "MyRule[beta=0.8]"
    assert own["equation"].startswith("v ← βv + (1−β)O(x)")
    assert own["parameters"] == plain["parameters"] + 2 * 2  # two scalars a substep
    assert own["flops_per_token"] == plain["flops_per_token"]
    assert own["state_bytes_per_token"] == 2 * plain["state_bytes_per_token"]
    assert own["tokens_per_second"]["median"] > 0
    assert own["scalars"].keys() == {"beta", "nu"}
    assert own["scalars"]["beta"]["mlp"] == pytest.approx([0.8], abs=0.05)
    assert all(run["status"] == "finished" for run in results["runs"])
    assert "MyRule" in (home / "out" / "report.html").read_text()

    monkeypatch.chdir(tmp_path)
    run = home / "out" / "runs" / "MyRule.beta=0.8-seed0"
    model, tokenizer = load_run(run)
    kept = f"code/{sha256_of(EXAMPLE)[:12]}/my_rule.py:MyRule"
    assert model.config.rule == f"{run}/{kept}"  # the run's own copy
    assert own["model"]["rule"] == kept
    assert sum(p.numel() for p in model.parameters()) == own["parameters"]
    assert cost(model.config).training_flops_per_token == own["flops_per_token"]
    ids = torch.from_numpy(tokenizer.encode("the quick"))[None].long()
    assert model(ids).shape == (1, len("the quick"), model.config.vocab_size)

    with (home / "rules" / "my_rule.py").open("a") as file:
        file.write("# changed\n")
    with pytest.warns(UserWarning, match=r"my_rule.py has changed since it was copied into"):
        load_run(run)
    (home / "rules" / "my_rule.py").unlink()
    load_run(run)
