"""Model cards, shared folders and uploads."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import polyak.interop.huggingface as hf
from polyak import ModelConfig, load_run, rules
from polyak.errors import ConfigError, RunError
from polyak.interop.card import PAPERS, card, model_card
from polyak.nn.cost import cost
from tests.interop.huggingface.conftest import one_line, python
from tests.interop.huggingface.hub import hub

ROOT = Path(__file__).parents[3]
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "weights.json",
    "model.safetensors",
    "modeling_polyak.py",
    "polyak_tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", text, flags=re.MULTILINE))


def test_the_card_holds_what_the_run_measured(run: Path) -> None:
    text = model_card(run, place="me/mine")
    recorded = json.loads((run / "run.json").read_text())
    result = json.loads((run / "result.json").read_text())
    validation, table = recorded["settings"]["validation"], rows(text)
    config = load_run(run)[0].config
    assert (
        table["validation loss"]
        == f"{result['loss']:.4f} nats a token ({validation['tokens']} tokens)"
    )
    assert float(table["perplexity"]) == pytest.approx(math.exp(result["loss"]), rel=1e-3)
    bits = result["loss"] * validation["tokens"] / validation["bytes"] / math.log(2)
    assert table["validation bits per byte"] == f"{bits:.4f}"
    assert table["steps"] == "3"
    assert table["tokens"] == f"{result['tokens']:,}"
    assert table["corpus"].startswith("corpus.txt (SHA-256 ")
    assert recorded["settings"]["corpus"]["fingerprint"][:16] in table["corpus"]
    assert table["parameters"].startswith(f"{cost(config).total_parameters:,} (")
    assert table["FLOPs a token, training"] == f"{cost(config).training_flops_per_token:,}"
    assert table["rule"] == "`triple_momentum`"
    assert rules.get("triple_momentum").equation in text
    assert recorded["environment"]["machine"]["cpu"] in table["hardware"]
    count = recorded["environment"]["machine"]["cores"]
    assert table["hardware"].endswith(" 1 core" if count == 1 else f" {count} cores")
    assert f"torch {torch.__version__}" in table["versions"]
    assert 'from_pretrained("me/mine", trust_remote_code=True)' in text
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert str(run.parent) not in text


def test_citations_are_those_of_the_citation_file() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    for paper, title in PAPERS.items():
        assert f"notes: {paper}" in citation
        assert title in citation
    papers = {rules.get(name).paper for name in rules.names()}
    assert papers - {""} <= PAPERS.keys()  # a rule of polyak's own has none
    for name in rules.names():
        text = card(ModelConfig(rule=name))
        title = PAPERS.get(rules.get(name).paper, "polyak")
        assert f"title = {{{title}" in text
        assert "@software{polyak," in text


def test_cards_of_encoders_and_of_rules_of_ones_own(tmp_path: Path) -> None:
    text = card(ModelConfig(causal=False))
    assert "pipeline_tag: fill-mask" in text
    assert "AutoModelForMaskedLM.from_pretrained" in text
    assert "generate" not in text
    rule = tmp_path / "own.py"
    rule.write_text((ROOT / "docs" / "examples" / "my_rule.py").read_text())
    text = card(ModelConfig(rule=f"{rule}:MyRule"))
    assert "`own.py:MyRule (not included)`" in text
    assert str(tmp_path) not in text


def test_a_shared_folder_is_complete(run: Path, tmp_path: Path) -> None:
    folder = hf.share(run, tmp_path / "shared")
    assert {file.name for file in folder.iterdir()} == FILES
    for file in FILES - {"README.md"}:
        assert (folder / file).read_bytes() == (run / "model" / file).read_bytes()
    assert (folder / "README.md").read_text() == model_card(run, place="shared")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("the", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, load_run(run)[0](ids))


def test_a_run_from_before_is_shared_in_full(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    for file in ("modeling_polyak.py", "tokenizer_config.json", "generation_config.json"):
        (old / "model" / file).unlink()
    config = json.loads((old / "model" / "config.json").read_text())
    (old / "model" / "config.json").write_text(json.dumps({"polyak": config["polyak"]}))
    folder = hf.share(old, tmp_path / "shared")
    assert {file.name for file in folder.iterdir()} == FILES
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_run_that_knows_little_of_its_training_has_a_card_all_the_same(
    run: Path, tmp_path: Path
) -> None:
    imported = tmp_path / "imported"
    shutil.copytree(run, imported)
    recorded = json.loads((run / "run.json").read_text())
    kept = {name: recorded["settings"][name] for name in ("model", "tokenizer")}
    (imported / "run.json").write_text(json.dumps({**recorded, "settings": kept}))
    (imported / "result.json").write_text('{"steps": null, "loss": null}')
    (imported / "metrics.jsonl").unlink()
    table = rows((hf.share(imported, tmp_path / "shared") / "README.md").read_text())
    assert table["tokenizer"] == "bytes"
    assert table.keys() >= {"rule", "parameters"}
    assert not table.keys() & {"steps", "corpus", "validation loss", "hardware", "versions"}


def test_what_cannot_be_shared_is_one_line(run: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "result.json").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for source, target, said in (
        (tmp_path, tmp_path / "a", "is not a run: run.json is missing"),
        (unfinished, tmp_path / "a", "did not finish"),
        (run, tmp_path / "full", "is not an empty folder"),
    ):
        with pytest.raises(RunError, match=said) as caught:
            hf.share(source, target)
        one_line(caught.value)
        assert not (tmp_path / "a").exists()


PUSH = """
import polyak.interop.huggingface as hf
from transformers import AutoModelForCausalLM, AutoTokenizer
print(hf.push({run!r}, "me/mine", private=True))
model = AutoModelForCausalLM.from_pretrained({model!r})
print(model.push_to_hub("me/loaded", tokenizer=AutoTokenizer.from_pretrained({model!r})))
model.norm.weight.data.mul_(2)
print(model.push_to_hub("me/changed"))
"""


def test_pushed_models_arrive_with_their_card_and_load(run: Path, tmp_path: Path) -> None:
    code = PUSH.format(run=str(run), model=str(run / "model"))
    with hub(tmp_path / "hub", token="hf_secret") as address:
        variables = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret"}
        done = python(code, cwd=tmp_path, **variables, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{address}/me/{name}/commit/{'0' * 40}" for name in ("mine", "loaded", "changed")
    ]
    mine, loaded, changed = (tmp_path / "hub" / "me" / n for n in ("mine", "loaded", "changed"))
    assert {file.name for file in mine.iterdir()} == FILES
    assert (mine / "README.md").read_text() == model_card(run, place="me/mine")
    assert (loaded / "README.md").read_text() == model_card(run, place="me/loaded")
    text = (changed / "README.md").read_text()  # other weights: those numbers are not theirs
    assert "validation loss" not in text
    assert "Not recorded with these weights" in text
    wanted = load_run(run)[0].state_dict()
    for folder in (mine, loaded):
        weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(weight, wanted[name]) for name, weight in weights.items())
        assert AutoTokenizer.from_pretrained(folder).decode([104, 105]) == "hi"


@pytest.mark.parametrize(
    "why",
    [
        "offline",
        pytest.param("nobody answers", marks=pytest.mark.slow),
        pytest.param("wrong token", marks=pytest.mark.slow),
    ],
)
def test_a_push_that_fails_is_one_line(run: Path, tmp_path: Path, why: str) -> None:
    code = f"import polyak.interop.huggingface as hf\nhf.push({str(run)!r}, 'me/mine')"
    with hub(tmp_path / "hub", token="hf_secret") as address:
        variables = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_other", "HF_HUB_OFFLINE": "0"}
        if why == "offline":
            variables["HF_HUB_OFFLINE"] = "1"
        if why == "nobody answers":
            variables["HF_ENDPOINT"] = "http://127.0.0.1:9"
        done = python(code, cwd=tmp_path, **variables)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("polyak.errors.RunError: cannot upload to 'me/mine': ")
    assert "hf upload" in last


def test_arguments_of_push_that_are_not_supported_are_named(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"push_to_hub\(revision=\) is not supported") as caught:
        tiny().push_to_hub("me/mine", revision="x")
    one_line(caught.value)
    with pytest.raises(RunError, match="call push_to_hub"):
        tiny().save_pretrained("nowhere", push_to_hub=True)
    assert not Path("nowhere").exists()
