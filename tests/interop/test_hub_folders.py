"""GPT-2 and Llama-family folders, made by transformers, as runs with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import run_config, write_corpus
from tiny_tokenizers import KINDS as KEPT
from tiny_tokenizers import save_tokenizer

from polyak import load_run
from polyak.cli.main import main
from polyak.data.tokenizer_names import read_tokenizer
from polyak.data.tokenizers import BPETokenizer
from polyak.errors import RunError
from polyak.evaluation.generation import complete
from polyak.evaluation.sampling_config import SamplingConfig
from polyak.interop.hub_folders import read_state
from polyak.interop.upgrade import upgrade
from polyak.nn.rule_text import parse_rule
from polyak.training.loop import train

transformers = pytest.importorskip("transformers")

GPT2 = {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_positions": 32, "vocab_size": 300}
LLAMA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", LLAMA),
    "llama-tied": ("Llama", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "interop-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def theirs(kind: str, **fields: Any) -> Any:
    """A random model of transformers, every weight off its initial value."""
    name, config = KINDS[kind]
    made = getattr(transformers, f"{name}Config")(**{**config, **fields})
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{suffix}")(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    BPETokenizer.train(["some text to train on " * 9], 257).save(folder)
    (folder / "polyak_tokenizer.json").unlink()
    return folder


def same(model: Any, run: Path) -> float:
    ours, _ = load_run(run)
    ids = torch.randint(257, (3, 20))
    with torch.no_grad():
        return float((ours(ids) - model(ids).logits).abs().max())


@every_kind
def test_a_folder_is_imported_with_identical_logits(kind: str, tmp_path: Path) -> None:
    model = theirs(kind)
    folder = save(model, tmp_path / "theirs")
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    assert same(model, tmp_path / "run") < 1e-5
    recorded = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert recorded["imported"]["format"] == f"Hugging Face, {kind.partition('-')[0]}"
    assert recorded["tokenizer"]["name"] == "bpe-257"


@pytest.mark.parametrize("kind", KEPT)
def test_a_llama_tokenizer_goes_on_as_it_was(kind: str, tmp_path: Path) -> None:
    """Ids, special tokens and continuations are those of the folder that was imported."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_tokenizer(kind, folder)
    chat = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    if kind == "byte-level":  # as older models have it, and newer ones
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": chat}))
    else:
        (folder / "chat_template.jinja").write_text(chat)
    model = theirs("llama", vocab_size=read_tokenizer(folder).vocab_size)
    model.save_pretrained(folder)
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    original = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=KEPT[kind][1]
    )
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ours, tokenizer = load_run(tmp_path / "run")
    assert len(again) == len(original) == tokenizer.vocab_size
    for text in ["The a b", KEPT[kind][1]]:
        assert again(text).input_ids == original(text).input_ids
    assert again.eos_token_id == original.eos_token_id == tokenizer.end_of_text
    assert again.bos_token_id == tokenizer.prefix[0] == original("").input_ids[0]
    written = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert written["bos_token_id"] == again.bos_token_id

    said = again.apply_chat_template([{"role": "a", "content": "b"}], tokenize=False)
    assert said == f"{again.bos_token}a: b"
    config = SamplingConfig(temperature=0, max_new_tokens=12, ignore_end_of_text=True)
    for prompt in ("The a", ""):
        ids = torch.tensor([original(prompt).input_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert list(complete(ours, tokenizer, [prompt], config)[0].tokens) == expected


@every_kind
@pytest.mark.parametrize("form", ["shards", "pickle", "pickle shards"])
def test_shards_and_pickles_hold_the_same_weights(kind: str, form: str, tmp_path: Path) -> None:
    model = theirs(kind)
    folder = save(model, tmp_path / "theirs", max_shard_size="20KB" if form == "shards" else "9GB")
    single = folder / "model.safetensors"
    if form == "shards":
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        state = load_file(single)
        single.unlink()
        if form == "pickle":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            names = sorted(state)
            places = {}
            for part, some in enumerate((names[::2], names[1::2])):
                torch.save({k: state[k] for k in some}, folder / f"pytorch_model-{part}.bin")
                places |= dict.fromkeys(some, f"pytorch_model-{part}.bin")
            index = folder / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"weight_map": places}))
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    assert same(model, tmp_path / "run") < 1e-5


@every_kind
@pytest.mark.parametrize("rule", ["heavy_ball", "nesterov", "triple_momentum"])
def test_imported_models_are_upgraded_exactly(kind: str, rule: str, tmp_path: Path) -> None:
    folder = save(theirs(kind), tmp_path / "theirs")
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    words = ["upgrade", str(tmp_path / "run"), str(tmp_path / "up"), "--rule", rule]
    assert main(words) == 0
    (old, _), (new, _) = load_run(tmp_path / "run"), load_run(tmp_path / "up")
    ids = torch.randint(257, (3, 20))
    assert torch.equal(old(ids), new(ids))
    new(ids).square().mean().backward()
    betas = [p.grad for name, p in new.named_parameters() if name.endswith("beta_raw")]
    assert all(grad is not None and grad.abs() > 0 for grad in betas)


@every_kind
def test_imported_models_are_fitted_where_a_norm_is_wanted(kind: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    folder = save(theirs(kind), tmp_path / "theirs")
    words = ["--corpus", str(corpus), "--tokens", "128"]
    assert main(["import", str(folder), str(tmp_path / "run"), *words]) == 0
    wanted = "triple_momentum[state_norm=layer]"
    up = tmp_path / "up"
    assert main(["upgrade", str(tmp_path / "run"), str(up), "--rule", wanted, *words]) == 0
    about = json.loads((up / "run.json").read_text())["settings"]["upgrade"]
    assert about["exact"] is False
    assert about["fitted_on"]["tokens"] == 128
    assert about["loss_after"] > 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
    ("llama", {"hidden_act": "gelu_fast"}, "hidden_act"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"model_type": "bloom"}, "holds a model of type 'bloom'"),
    ("gpt2", {"n_layer": None}, "num_layers=None"),
    ("llama", {"hidden_act": "silly"}, "import: unknown hidden_act 'silly'; did you mean 'silu'?"),
    ("llama", {"num_attention_heads": 0}, "config.json is not whole: ZeroDivisionError"),
    ("llama", {"rope_parameters": {"rope_theta": "x"}}, "config.json is not whole: ValueError"),
    # said without taking the memory of such a model
    ("llama", {"vocab_size": 10**13}, "vocab_size=10000000000000 must be at most 2,147,483,647"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED, ids=str)
def test_what_polyak_does_not_compute_is_refused_by_name(
    kind: str,
    fields: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = save(theirs(kind), tmp_path / "theirs")
    file = folder / "config.json"
    content = json.loads(file.read_text())
    if "rope_scaling" in fields:
        content.pop("rope_parameters", None)
    file.write_text(json.dumps({**content, **fields}))
    assert main(["import", str(folder), str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_damaged_folders_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(theirs("gpt2"), tmp_path / "theirs", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))

    def refused(*words: str) -> str:
        assert main(["import", str(folder), str(tmp_path / "run"), *words]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "run").exists()
        return error

    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-9])
    assert "cannot be loaded" in refused()
    shards[0].unlink()
    assert "is missing, one of the shards" in refused()
    state = {k: torch.zeros(3) for k in ("wte.weight",)}
    save_file(state, shards[0])
    assert "which no shard holds" in refused()
    shards[0].write_bytes(whole)
    assert "--rule is for released checkpoint files" in refused("--rule", "adam")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert "must be the name of a file in this folder" in refused()
    index.unlink()
    assert "holds no weights" in refused()
    with pytest.raises(RunError, match="holds no weights"):
        read_state(folder)
    (folder / "config.json").unlink()
    assert "cannot read" in refused()


def test_a_tokenizer_that_polyak_cannot_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(theirs("llama"), tmp_path / "theirs")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert main(["import", str(folder), str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "is no tokenizer that polyak can use: it is not byte-level BPE" in error
    assert main(["import", str(folder), str(tmp_path / "run"), "--tokenizer", "bytes"]) == 0


def test_another_tokenizer_is_taken_along_where_its_folder_says_what_ends_a_text(
    tmp_path: Path,
) -> None:
    folder, corpus = save(theirs("llama"), tmp_path / "theirs"), write_corpus(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    byte_level = {**content["pre_tokenizer"], "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    run, up = tmp_path / "run", tmp_path / "up"
    words = ["--corpus", str(corpus), "--tokens", "128"]
    assert main(["import", str(folder), str(run), *words]) == 0
    _, tokenizer = load_run(run)
    expected = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = "the quick brown fox"
    assert tokenizer.encode(text).tolist() == expected(text)["input_ids"]
    assert main(["upgrade", str(run), str(up), *words]) == 0
    more = ["--steps", "2", "--device", "cpu", "--out", str(tmp_path / "more")]
    more += ["--set", "training.eval_tokens=128", "--set", "training.batch_size=2"]
    assert main(["train", "--init", str(up), *more]) == 0


def test_without_a_network_a_hub_name_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["import", "nobody/nothing-here", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "not in Hugging Face's cache" in error
    assert main(["import", "no such file.pt", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "polyak import: no such file.pt does not exist\n"


def test_a_run_of_polyak_needs_no_import(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(theirs("gpt2"), tmp_path / "theirs")
    assert main(["import", str(folder), str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["import", str(tmp_path / "run"), str(tmp_path / "again")]) == 1
    assert "is a run of polyak already" in capsys.readouterr().err
    model, _ = load_run(tmp_path / "run")
    assert upgrade(model, parse_rule("heavy_ball"), lambda: torch.zeros(1, 1)).exact
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "best.pt")]) == 1
    assert "the released checkpoints have" in capsys.readouterr().err


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("saved", ["shared", "save_pretrained"])
def test_a_model_that_was_shared_is_a_run_again(saved: str, tie: bool, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "theirs"
    settings = {"tie_embeddings": tie, "rule_options": {"beta": 0.3}}
    train(run_config(write_corpus(tmp_path), "triple_momentum", steps=2, **settings), run)
    if saved == "shared":
        from polyak.interop.huggingface import share

        share(run, folder)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
        loaded.save_pretrained(folder, max_shard_size="20KB")
        transformers.AutoTokenizer.from_pretrained(run / "model").save_pretrained(folder)
    assert main(["import", str(folder), str(tmp_path / "again")]) == 0
    (before, told), (after, tells) = load_run(run), load_run(tmp_path / "again")
    assert after.config == before.config
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight)
    text = "a b <|endoftext|> Größe"
    assert tells.encode(text).tolist() == told.encode(text).tolist()
    assert tells.end_of_text == told.end_of_text


def test_a_shared_model_does_not_name_code_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(run_config(write_corpus(tmp_path), steps=2), run)
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    (run / "run.json").unlink()
    file = run / "model/config.json"
    content = json.loads(file.read_text())
    content["polyak"]["rule"] = f"{trap}:Rule"
    file.write_text(json.dumps(content))
    assert main(["import", str(run / "model"), str(tmp_path / "again")]) == 1
    assert "brings code of its own that was not made here" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()
    for damaged in ("all of it", 7, {"rule": "gradient_descent", "depth": 3}, None):
        file.write_text(json.dumps({**content, "polyak": damaged}))
        assert main(["import", str(run / "model"), str(tmp_path / "again")]) == 1
        assert capsys.readouterr().err.count("\n") == 1
