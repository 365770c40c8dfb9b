"""The `model/` folder of a run, as Hugging Face reads it, with and without polyak imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import polyak.interop.huggingface as hf
from polyak import ModelConfig, load_run
from polyak.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from polyak.training.runs.model_files import write_model_files
from tests.interop.huggingface.conftest import python

TEXTS = [
    "",
    " ",
    "the quick brown fox",
    "<|endoftext|>",
    "one<|endoftext|>two <|endoftext|>\n",
    "naïve “web” text, 数字 と\tタブ\r\n\n  two  spaces ",
    "don't we'll I'M  x\u00a0y\u3000z \ufeff\u200b",
    "👩‍👩‍👧‍👦 e\u0301 \U0010ffff \x00\x7f\x80",
    "a .b , c ! n't 's",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, Path]]:
    """Both kinds, saved as a run saves them."""
    text = " ".join(TEXTS) + " the quick brown fox jumps over the lazy dog" * 20
    found = []
    for ours in (ByteTokenizer(), BPETokenizer.train([text], 300)):
        folder = tmp_path_factory.mktemp(ours.name)
        ours.save(folder)
        write_model_files(folder, ModelConfig(vocab_size=ours.vocab_size), ours)
        found.append((ours, folder))
    return found


def equal(ours: Tokenizer, folder: Path, texts: list[str]) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(np.array(ids, dtype=np.int64)) == text
    assert theirs(texts)["input_ids"] == [ours.encode(text).tolist() for text in texts]


def test_auto_tokenizer_gives_polyaks_ids_and_text(
    tokenizers: list[tuple[Tokenizer, Path]],
) -> None:
    for ours, folder in tokenizers:
        equal(ours, folder, TEXTS)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert len(theirs) == ours.vocab_size
        assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == ours.end_of_text
        ids = [*ours.encode("one").tolist(), ours.end_of_text, *ours.encode("two").tolist()]
        assert theirs.decode(ids) == ours.decode(ids) == "one<|endoftext|>two"
        assert theirs.decode(ids, skip_special_tokens=True) == "onetwo"
        padded = theirs(["one", "three"], padding=True)
        assert padded["attention_mask"][0][0] == 0  # on the left
        assert padded["input_ids"][0][0] == ours.end_of_text
        assert padded.keys() == {"input_ids", "attention_mask"}


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=30))
def test_any_unicode_is_encoded_as_polyak_encodes_it(
    tokenizers: list[tuple[Tokenizer, Path]], texts: list[str]
) -> None:
    for ours, folder in tokenizers:
        equal(ours, folder, texts)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_ids_are_decoded_as_polyak_decodes_them(
    tokenizers: list[tuple[Tokenizer, Path]], data: st.DataObject
) -> None:
    for ours, folder in tokenizers:
        theirs = AutoTokenizer.from_pretrained(folder)
        for _ in range(10):
            ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
            assert theirs.decode(ids) == ours.decode(np.array(ids, dtype=np.int64))


def test_a_saved_tokenizer_stays_the_same(
    tokenizers: list[tuple[Tokenizer, Path]], tmp_path: Path
) -> None:
    for ours, folder in tokenizers:
        target = tmp_path / ours.name
        AutoTokenizer.from_pretrained(folder).save_pretrained(target)
        equal(ours, target, TEXTS)


def test_a_runs_model_folder_is_the_model_that_load_run_gives(run: Path) -> None:
    ours, tokenizer = load_run(run)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert type(model) is hf.PolyakForCausalLM
    assert type(AutoConfig.from_pretrained(run / "model")) is hf.PolyakConfig
    assert not model.training
    weights = ours.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    ids = torch.from_numpy(tokenizer.encode("the quick"))[None]
    assert torch.equal(model(ids).logits, ours(ids))
    end = tokenizer.end_of_text
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (end,) * 3


def test_what_a_run_writes_is_what_save_pretrained_writes(run: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(run / "model").save_pretrained(tmp_path)
    first, second = (
        json.loads((folder / "config.json").read_text()) for folder in (run / "model", tmp_path)
    )
    extra = {"transformers_version", "use_cache"}
    assert first == {name: value for name, value in second.items() if name not in extra}
    for file in ("modeling_polyak.py",):
        assert (run / "model" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_load_run_reads_what_transformers_saved_and_folders_from_before(
    run: Path, tmp_path: Path
) -> None:
    import shutil

    wanted = load_run(run)[0].state_dict()
    saved, old = tmp_path / "saved", tmp_path / "old"
    for folder in (saved, old):
        shutil.copytree(run, folder)
    AutoModelForCausalLM.from_pretrained(run / "model").save_pretrained(saved / "model")
    kept = {"config.json", "model.safetensors", "tokenizer.json", "polyak_tokenizer.json"}
    for file in (old / "model").iterdir():
        if file.name not in kept:
            file.unlink()
    config = json.loads((old / "model" / "config.json").read_text())
    (old / "model" / "config.json").write_text(json.dumps({"polyak": config["polyak"]}))
    for folder in (saved, old):
        model, _ = load_run(folder)
        assert all(torch.equal(w, wanted[name]) for name, w in model.state_dict().items())


REMOTE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
assert "polyak" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True)
ids = model.generate(**tokenizer(["the", "a"], return_tensors="pt", padding=True),
                     max_new_tokens=4, do_sample=False)
print("ids", ids.tolist())
model.save_pretrained({out!r})
write = pipeline("text-generation", model={folder!r}, trust_remote_code=True)
print(write("the", max_new_tokens=2))
again = AutoModelForCausalLM.from_pretrained({out!r}, trust_remote_code=True)
assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters()))
import pathlib
print("files", sorted(p.name for p in pathlib.Path({out!r}).glob("*.py")))
"""


def test_a_process_that_never_imports_polyak_trusts_the_folders_code(
    run: Path, tmp_path: Path
) -> None:
    code = REMOTE.format(folder=str(run / "model"), out=str(tmp_path / "out"))
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    inputs = tokenizer(["the", "a"], return_tensors="pt", padding=True)
    assert (
        json.loads(said["ids"])
        == model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    )
    assert said["files"] == "['modeling_polyak.py']"


@pytest.mark.slow
def test_without_trust_the_folders_code_does_not_run(run: Path, tmp_path: Path) -> None:
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(run / 'model')!r}, trust_remote_code=False)"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_a_run_is_written_without_transformers(corpus: Path, tmp_path: Path, run: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        f"sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "from pathlib import Path\n"
        "from tiny_runs import run_config\n"
        "from polyak.training.loop import train\n"
        f"corpus = Path({str(corpus)!r})\n"
        "config = run_config(corpus, 'triple_momentum', steps=3, context_length=24)\n"
        "train(config, Path('run'))\n"
    )
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {f.name: f.read_bytes() for f in (tmp_path / "run" / "model").iterdir()}
    assert files == {f.name: f.read_bytes() for f in (run / "model").iterdir()}


def test_without_transformers_the_extra_is_named(tmp_path: Path) -> None:
    done = python(
        "import sys; sys.modules['transformers'] = None\nimport polyak.interop.huggingface",
        cwd=tmp_path,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingExtraError" in last
    assert "pip install 'polyak[hf]'" in last


def test_another_models_tokenizer_is_one_line(
    run: Path, tokenizers: list[tuple[Tokenizer, Path]], tiny: Callable[..., hf.PolyakForCausalLM]
) -> None:
    from polyak.errors import ConfigError

    theirs = AutoTokenizer.from_pretrained(tokenizers[1][1])  # of 300 ids
    model = AutoModelForCausalLM.from_pretrained(run / "model")  # of 256
    with pytest.raises(ConfigError, match="vocab_size=256; the tokenizer is another model's"):
        model.generate(**theirs("the quick brown fox", return_tensors="pt"), max_new_tokens=1)
