"""Kinds of attention by the commands: trained, compared, a user's own kept, tried and trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import polyak, settings_beside

from polyak import load_run
from polyak.cli.main import main

KIND = '''
import torch
from polyak.nn.attention import Attention, flag, unit

class Fading(Attention):
    """Values that fade with distance."""

    keep = unit(0.5, about="what is left of a value at the next token")
    peek = flag(False, about="see one token more")

    def attend(self, q, k, v, context, dropout):
        k, v = (k, v) if context is None else context.extend(k, v)
        place = torch.arange(v.shape[2])
        apart = place[-q.shape[2]:, None] - place
        keep = torch.as_tensor(self.coefficient("keep", context)).reshape(-1, 1, 1)
        weights = keep ** apart.clamp(min=0)
        y = torch.where(apart < -int(self.peek), 0, weights).to(v.dtype) @ v
        return y
'''
Streams = pytest.CaptureFixture[str]


def train(corpus: Path, out: Path, *more: str) -> int:
    sizes = settings_beside(more)
    words = ["train", "--corpus", str(corpus), "--steps", "4", "--device", "cpu", *sizes, *more]
    return main([*words, "--out", str(out)])


def test_a_run_with_momentum_attention_trains_resumes_and_generates(
    corpus: Path, tmp_path: Path, capsys: Streams
) -> None:
    learned = ["--set", "model.attention=momentum", "--set", "model.attention_options.mu=0.9"]
    learned += ["--set", "model.attention_options.mu_learned=model"]
    assert train(corpus, tmp_path / "run", *learned) == 0
    assert train(corpus, tmp_path / "run", *learned, "--resume") == 0
    model, _ = load_run(tmp_path / "run")
    assert model.config.attention_options == {"mu": 0.9, "mu_learned": "model"}
    mu = model.scalars()["attention.mu"]["attention"]
    assert 0 < mu[0] < 1
    assert mu[0] != pytest.approx(0.9, abs=1e-4)  # it was learned
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    (last,) = [row["scalars"] for row in rows if row.get("scalars")][-1:]
    assert last["attention.mu"]["attention"] == pytest.approx(mu)
    assert "memory cannot be estimated" not in capsys.readouterr().err
    words = ["--prompt", "the quick", "--max-new-tokens", "12", "--ignore-end-of-text"]
    assert main(["generate", str(tmp_path / "run"), *words]) == 0
    assert capsys.readouterr().out.startswith("the quick")
    options = ["--set", "model.attention_options.mv=0.9"]
    assert train(corpus, tmp_path / "no", "--set", "model.attention=momentum", *options) == 1
    assert "unknown option of attention momentum 'mv'" in capsys.readouterr().err


@pytest.mark.slow
def test_entries_of_a_comparison_differ_in_attention(
    corpus: Path, tmp_path: Path, capsys: Streams
) -> None:
    entries = (
        "gradient_descent,gradient_descent[attention=linear],"
        "nesterov[attention=momentum,attention.mu=0.3,attention.mu_learned=head]"
    )
    words = ["compare", "--rules", entries, "--corpus", str(corpus), "--seeds", "1", "--steps", "3"]
    out = tmp_path / "out"
    assert main([*words, *settings_beside(()), "--device", "cpu", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    kinds = [entry["model"]["attention"] for entry in results["entries"]]
    assert kinds == ["softmax", "linear", "momentum"]
    assert results["entries"][2]["model"]["attention_options"] == {"mu": 0.3, "mu_learned": "head"}
    assert "attention.mu" in results["entries"][2]["scalars"]
    assert results["entries"][1]["flops_per_token"] != results["entries"][0]["flops_per_token"]
    assert "attention" not in results["settings"]["model"]


@pytest.mark.slow
def test_a_users_kind_is_tried_kept_and_asked_for(
    corpus: Path, tmp_path: Path, capsys: Streams
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "fading.py").write_text(KIND)
    name = f"{home}/fading.py:Fading"
    assert main(["rules", "--check", f"nesterov[attention={name},attention.keep=0.3]"]) == 0
    assert "no leak at 1, 2, 17, 128 tokens" in capsys.readouterr().out
    assert main(["rules", "--check", f"nesterov[attention={name},attention.peek=true]"]) == 1
    assert "attention Fading sees later tokens" in capsys.readouterr().err
    rule = ["--rule", f"nesterov[attention={name},attention.keep_learned=head]"]
    assert train(corpus, home / "run", *rule) == 0
    shutil.move(home, tmp_path / "moved")  # the run has a copy of the file
    run = tmp_path / "moved" / "run"
    (copy,) = run.glob("code/*/fading.py")
    assert copy.read_text() == KIND
    model, _ = load_run(run)
    assert "attention.keep.std" in model.scalars()
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.long))).all()
    words = ["generate", run, "--prompt", "a", "--max-new-tokens", "3"]
    other = {"cwd": tmp_path, "cache": tmp_path / "cache", "POLYAK_CONFIG": str(tmp_path / "other")}
    refused = polyak(*words, **other)  # another user
    assert refused.returncode == 1
    assert "brings code of its own that was not made here: class Fading" in refused.stderr
    assert polyak(*words, "--trust-code", **other).returncode == 0
