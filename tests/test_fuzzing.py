"""Whatever is read from a folder is data: damaged a thousand times over, it is refused in a line.

Every reader of a file that may come from elsewhere stands in `READERS`. A sample of damaged inputs
runs by default, the thousand under `-m slow`, and whole commands over damaged folders beside it.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz import Reader, damaged, fuzz
from safetensors.torch import load_file
from tiny_runs import polyak

from polyak import ModelConfig, Transformer, load_run
from polyak.compare.plan import make_plan  # noqa: F401  # imported before the fork, as all below
from polyak.data import journal
from polyak.data.corpora import load_corpus
from polyak.data.documents import parts_of
from polyak.data.prepare import open_prepared
from polyak.data.tokenizer_names import read_tokenizer
from polyak.errors import RunError
from polyak.evaluation.subjects import load_subject
from polyak.formats import read_results
from polyak.interop import hub_folders, released_files
from polyak.report.pages import check_out
from polyak.study.runs.measure import gather, read_run
from polyak.training.config import recipes
from polyak.training.processes.distributed import World
from polyak.training.runs.checkpoints import Checkpoints
from polyak.training.train_config import TrainOptions, resolve
from tests.study.kept_measurements import made

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="reads in forked processes")

KEPT = Path(__file__).parent / "releases" / "0.1.0"
SAMPLE, ALL = 30, 1000


def _tokenizers(folder: Path) -> None:
    """A byte-level tokenizer.json, GPT-2's pair of files, and one that came with a model."""
    letters = json.loads((KEPT / "prepared" / "tokenizer.json").read_text())
    (folder / "bytes").mkdir(parents=True)
    for name in ("tokenizer.json", "polyak_tokenizer.json"):
        shutil.copy(KEPT / "prepared" / name, folder / "bytes")
    vocabulary = {t: i for t, i in letters["model"]["vocab"].items() if len(t) == 1}
    vocabulary = {token: number for number, token in enumerate(vocabulary)}
    pairs = [("a", "b"), ("ab", "c")]
    for left, right in pairs:
        vocabulary[left + right] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (folder / "pair").mkdir()
    (folder / "pair" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "pair" / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (folder / "kept").mkdir()
    byte_level = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    kept = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", **byte_level},
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in pairs]},
    }
    (folder / "kept" / "tokenizer.json").write_text(json.dumps(kept))
    about = {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    (folder / "kept" / "tokenizer_config.json").write_text(json.dumps(about))


def _corpora(folder: Path) -> None:
    folder.mkdir()
    records = [{"id": n, "text": f"a lamp on table {n} and a naïve café"} for n in range(30)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "c.json").write_text(json.dumps(records))
    (folder / "d.txt").write_text("naïve text\n" * 20)
    table = pa.table({"text": [record["text"] for record in records]})
    for compression in ("snappy", "gzip", "none"):
        pq.write_table(table, folder / f"e-{compression}.parquet", compression=compression)


def _models(folder: Path) -> None:
    """GPT-2 and Llama of Hugging Face, whole and in shards, and released checkpoints."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    shape = {"vocab_size": 64, "tie_word_embeddings": True}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, **shape))
    gpt2.save_pretrained(folder / "gpt2")
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            **shape,
        )
    )
    llama.save_pretrained(folder / "llama", max_shard_size="4KB")
    (folder / "released").mkdir()
    model = Transformer(ModelConfig(num_layers=1, num_heads=2, d_model=16, context_length=16))
    released_files.write(model, folder / "released" / "bare.pt")
    released_files.write(model, folder / "released" / "training.pt", "training", step=3)
    torch.save(
        {"a": torch.ones(2)}, folder / "released" / "old.pt", _use_new_zipfile_serialization=False
    )


def _recipes(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.toml").write_text(
        'base = "./b.toml"\ncorpus = "texts"\nthreads = 1\ntrackers = ["wandb"]\n[model]\n'
        'rule = "triple_momentum"\nnum_layers = 2\nnum_heads = 2\nd_model = 8\n'
        'mlp_width = "none"\n[model.rule_options]\nmu = 0.9\n[training]\nsteps = 3\n'
        "muon_lr = 0.01\nadam_betas = [0.9, 0.95]\n"
    )
    (folder / "b.toml").write_text(
        'base = "quick"\n[model]\npreset = "gpt2"\n[training]\nwarmup = 0.1\nbatch_size = 2\n'
    )


def _journals(folder: Path) -> None:
    folder.mkdir()
    shard = np.arange(50, dtype="<u2").tobytes()
    (folder / "train-00000.bin").write_bytes(shard)
    log = journal.Journal(folder, {"what": "x"})
    log.start()
    (folder / "train-00000.bin").write_bytes(shard)
    digest = journal._hash_of_start(folder / "train-00000.bin", 60)
    shards = [{"file": "train-00000.bin", "tokens": 30, "text_bytes": 30, "sha256": digest}]
    place = {"read": 3, "parts": 0, "empty": 0, "sides": {"train": {"shards": shards}}}
    log.add({**place, "sides": {"train": {"documents": 2, "shards": shards}}})


def _read_corpora(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        for document in load_corpus(str(file)).documents:
            assert sum(map(len, parts_of(document.text))) >= 0


def _read_checkpoint(folder: Path) -> None:
    found = Checkpoints(folder / "checkpoints", world=World()).newest()
    for name in ("model", "optimizer") if found is not None else ():
        like = load_file(KEPT / "run" / "checkpoints" / "step-000006" / f"{name}.safetensors")
        found.load(name, like, World())


def _read_run(folder: Path) -> None:
    _, tokenizer = load_run(folder)
    tokenizer.decode(tokenizer.encode("a lamp"))
    load_subject(folder)


def _read_prepared(folder: Path) -> None:
    prepared = open_prepared(folder)
    for side in (prepared.train, prepared.validation):
        prepared.tokenizer.decode(side[:50])
        assert (side.byte_table[side[:50]] >= 0).all()


def _read_tokenizers(folder: Path) -> None:
    for place in sorted(folder.iterdir()):
        tokenizer = read_tokenizer(place)
        ids = tokenizer.encode("a naïve lamp abc")
        tokenizer.decode(ids)
        assert len(tokenizer.byte_table) == tokenizer.vocab_size


def _read_models(folder: Path) -> None:
    for place in sorted(folder.iterdir()):
        if place.name != "released":
            hub_folders.load(place)


def _read_released(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        released = released_files.read(file)
        if file.name != "old.pt":
            released_files.build(released, num_heads=2)


def _read_journal(folder: Path) -> None:
    log = journal.Journal(folder, {"what": "x"})
    log.resume(np.dtype("<u2"))


def _resume(folder: Path) -> None:
    resolve(TrainOptions(out=folder, resume=True))


def _report(folder: Path) -> None:
    gather([read_run(folder, "run")], command="polyak report")


def _read_results(folder: Path) -> None:
    read_results(folder / "results.json")
    check_out(folder, "comparison")


def _files(folder: Path, *inside: str) -> tuple[str, ...]:
    found = [path for name in inside or (".",) for path in (folder / name).rglob("*")]
    return tuple(sorted(p.relative_to(folder).as_posix() for p in found if p.is_file()))


@pytest.fixture(scope="session")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    """Every reader with the small real files that it reads."""
    place = tmp_path_factory.mktemp("real")
    for name, make in {
        "tokenizers": _tokenizers,
        "corpora": _corpora,
        "models": _models,
        "recipes": _recipes,
        "journal": _journals,
    }.items():
        make(place / name)
    (place / "studies").mkdir()
    studies = made(place / "studies")
    run, shutil_run = KEPT / "run", place / "run"
    shutil.copytree(run, shutil_run)
    released = place / "models" / "released"
    parts: list[tuple[Any, ...]] = [
        ("run", shutil_run, ("run.json", "result.json", *_files(run, "model")), _read_run),
        ("model config", shutil_run, ("model/config.json",), _read_run),
        ("run resumed", shutil_run, ("run.json",), _resume),
        ("metrics", shutil_run, ("metrics.jsonl", "run.json", "result.json"), _report),
        ("checkpoint", shutil_run, _files(run, "checkpoints/step-000006"), _read_checkpoint),
        ("weights", shutil_run, ("model/model.safetensors",), _read_run),
        ("results", KEPT / "comparison", ("results.json",), _read_results),
        ("prepared", KEPT / "prepared", _files(KEPT / "prepared"), _read_prepared),
        ("manifest", KEPT / "prepared", ("manifest.json",), _read_prepared),
        ("tokenizers", place / "tokenizers", _files(place / "tokenizers"), _read_tokenizers, True),
        ("corpora", place / "corpora", _files(place / "corpora"), _read_corpora, True),
        ("parquet", place / "corpora", ("e-gzip.parquet", "e-none.parquet"), _read_corpora, True),
        ("models", place / "models", _files(place / "models", "gpt2", "llama"), _read_models, True),
        ("released", released, _files(released), _read_released, True),
        ("recipes", place / "recipes", ("a.toml", "b.toml"), lambda f: recipes.load(f"{f}/a.toml")),
        ("journal", place / "journal", _files(place / "journal"), _read_journal),
        *((name, place / "studies" / name, *files) for name, files in studies.items()),
    ]
    return {part[0]: Reader(*part) for part in parts}


NAMES = (
    *("run", "model config", "run resumed", "metrics", "checkpoint", "weights", "results"),
    *("prepared", "manifest", "tokenizers", "corpora", "parquet", "models", "released"),
    *("recipes", "journal", "sharpness", "spectrum", "study parts", "speeds"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_damaged_inputs_is_read_or_refused_in_a_line(
    name: str, readers: dict[str, Reader], tmp_path: Path
) -> None:
    assert fuzz(readers[name], SAMPLE, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_damaged_inputs_are_read_or_refused_in_a_line(
    name: str, readers: dict[str, Reader], tmp_path: Path
) -> None:
    assert fuzz(readers[name], ALL, tmp_path) == []


def test_the_readers_read_what_is_not_damaged(readers: dict[str, Reader], tmp_path: Path) -> None:
    for name in NAMES:
        reader = readers[name]
        shutil.copytree(reader.source, tmp_path / name)
        reader.read(tmp_path / name)


FOUND = ("results.json", "runs", 0, "found")
PART = "parts/run/{}.json"


@pytest.mark.parametrize(
    ("name", "place", "value", "says"),
    [
        ("sharpness", (*FOUND, "x"), 1, "found.x must be left out: no field has this name"),
        ("sharpness", (*FOUND, "density", "weights", 1), [1], "density.weights.1 must be a list"),
        (
            "sharpness",
            (*FOUND, "rise", "rises"),
            [],
            "rises must be a list of 1, found a list of 0",
        ),
        (
            "sharpness",
            (*FOUND, "slices", "plane", "losses", 2),
            [1],
            "plane.losses.2 must be a list",
        ),
        ("sharpness", (*FOUND, "loss", "value"), 1e40, "from -1e+30 to 1e+30, found 1e+40"),
        ("spectrum", (*FOUND, "2/0/a"), {}, "found.2/0/a must be left out: no field has this"),
        ("spectrum", (*FOUND, "0/0/a", "sigma_min", "kind"), "x", "sigma_min.kind must be one of"),
        ("spectrum", (*FOUND, "0/product/b", "sigma_max", "low"), None, "sigma_max.low must be a"),
        (
            "study parts",
            (PART.format("spectrum"), "found", "spectra", "0/0/d"),
            {},
            "0/0/d must be",
        ),
        (
            *("study parts", (PART.format("evaluate"), "found", "own", "skipped_files"), 5),
            "found.own.skipped_files must be an object of at most 100 fields, found 5; remove it",
        ),
        (
            *("speeds", ("speeds.json", "adam", "tokens_per_second", "low"), 0),
            "speeds.adam.tokens_per_second.low must be a number from 1e-12 to 1e+15, found",
        ),
    ],
)
def test_what_no_measurement_has_is_refused_by_its_name(
    name: str,
    place: tuple[Any, ...],
    value: Any,
    says: str,
    readers: dict[str, Reader],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(readers[name].source, tmp_path / "copy")
    file, *above, last = place
    content = json.loads((folder / file).read_text())
    inside = content
    for step in above:
        inside = inside[step]
    inside[last] = value
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(RunError) as caught:
        readers[name].read(folder)
    assert says in str(caught.value)
    assert str(folder / file) in str(caught.value)


COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("run", ("evaluate", ".", "--corpora", "stdlib", "--tokens", "64", "--out", "page")),
    ("model config", ("generate", ".", "--prompt", "a", "--max-new-tokens", "2")),
    ("metrics", ("report", ".", "--out", "page")),
    ("run resumed", ("train", "--out", ".", "--resume", "--dry-run")),
    ("corpora", ("prepare", ".", "--cache", "cache")),
    ("recipes", ("train", "--recipe", "a.toml", "--dry-run")),
    ("tokenizers", ("prepare", "stdlib", "--tokenizer", "kept", "--verify", "--cache", "cache")),
    ("models", ("import", "gpt2", "out", "--tokenizer", "bytes")),
    ("released", ("import", "training.pt", "out", "--num-heads", "2")),
    ("results", ("compare", "--quick", "--steps", "1", "--out", ".")),
)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2 * len(COMMANDS)))
def test_a_command_over_a_damaged_folder_ends_in_a_line(
    number: int, readers: dict[str, Reader], tmp_path: Path
) -> None:
    name, words = COMMANDS[number % len(COMMANDS)]
    made = damaged(replace(readers[name], alone=False), 7000 + number, tmp_path / "damaged")
    done = polyak(*words, cwd=tmp_path / "damaged", cache=tmp_path / "cache")
    lines = done.stderr.split("\n")
    assert done.returncode in (0, 1, 2), (made, done)
    assert "Traceback" not in done.stderr
    assert "(--debug shows where)" not in done.stderr, (made, done.stderr)
    assert all(line.isprintable() for line in lines), (made, done.stderr)
    if done.returncode:
        assert lines[-2].startswith(f"polyak {words[0]}: "), (made, done.stderr)
