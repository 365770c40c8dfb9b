"""Trained models as subjects, and the fixed tokens they are looked at on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import run_config

from polyak.data.prepare import prepare
from polyak.errors import ConfigError, DataError, PolyakError, RunError
from polyak.evaluation.subjects import corpus_of, load_subject, load_subjects, side_of, token_set
from polyak.training.loop import train
from polyak.training.loss import LossModule
from polyak.training.trainer import validation_set


def test_the_runs_own_tokens_are_its_validation_set_and_give_its_last_loss(run: Path) -> None:
    subject = load_subject(run)
    assert subject.config is not None
    assert not subject.model.training
    assert subject.name == "triple_momentum"
    found = token_set(subject, tokens=subject.config.training.eval_tokens)
    blocks = validation_set(subject.config, prepare(subject.config.corpus))
    assert np.array_equal(found.ids.numpy(), np.concatenate(list(blocks)))
    recorded = subject.settings["validation"]
    assert found.fingerprint == recorded["fingerprint"]
    assert (found.tokens, found.bytes) == (recorded["tokens"], recorded["bytes"])
    assert found.ids.dtype == torch.int64
    with torch.no_grad():
        loss = float(LossModule(subject.model)(found.ids)) / found.tokens  # type: ignore[arg-type]
    assert loss == pytest.approx(json.loads((run / "result.json").read_text())["loss"], rel=1e-6)


def test_runs_get_distinct_names_and_a_folder_stands_for_its_runs(
    runs: Path, tmp_path: Path
) -> None:
    assert [s.name for s in load_subjects([runs])] == ["gradient_descent", "triple_momentum"]
    shutil.copytree(runs / "gradient_descent", tmp_path / "again" / "gradient_descent")
    names = [s.name for s in load_subjects([runs, tmp_path / "again" / "gradient_descent"])]
    assert len(set(names)) == 3
    assert names[2] == "again/gradient_descent"


def test_another_corpus_is_cut_with_the_subjects_own_tokenizer(
    corpus: Path, other: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(run_config(corpus, steps=1, vocab_size=270), tokenizer="bpe-270")
    train(config, tmp_path / "bpe")
    subject = load_subject(tmp_path / "bpe")
    found = token_set(subject, str(other), tokens=64)
    assert found.tokens == 64
    text = subject.tokenizer.decode(found.ids[0].numpy())
    assert "straße" in text
    lengths = subject.tokenizer.byte_lengths(found.ids[:, 1:].numpy())
    assert found.bytes == int(lengths.sum())
    # a prepared folder serves as it is, one with another tokenizer never
    prepared = corpus_of(subject, str(other)).folder
    again = token_set(subject, str(prepared), tokens=64)
    assert again.fingerprint == found.fingerprint
    with pytest.raises(DataError, match=r"prepared with tokenizer 'bytes', but bpe was trained"):
        token_set(subject, str(prepare(str(other)).folder), tokens=64)


def test_length_and_split_are_choices_and_the_tokens_are_all_there_are_at_most(
    run: Path, corpus: Path
) -> None:
    subject = load_subject(run)
    found = token_set(subject, str(corpus), tokens=10**9, length=5, split="train")
    side = side_of(corpus_of(subject, str(corpus)), "train")
    assert found.ids.shape == ((len(side) - 1) // 5, 6)
    assert np.array_equal(found.ids[:2, :5].flatten().numpy(), side[:10])
    for wrong, says in (
        ({"tokens": 15}, "tokens=15 is less than one block of 16 tokens"),
        ({"tokens": 99, "length": 17}, "length=17 must be from 1 to the model's context_length=16"),
        ({"tokens": 99, "split": "dev"}, "unknown split 'dev'"),
        ({"tokens": 99, "split": "test"}, "has no test side"),
    ):
        with pytest.raises(PolyakError, match=says):
            token_set(subject, str(corpus), **wrong)  # type: ignore[arg-type]


def test_a_corpus_that_changed_since_training_is_refused_unless_it_is_named(
    run: Path, tmp_path: Path
) -> None:
    subject = load_subject(run)
    assert subject.config is not None
    changed = tmp_path / "corpus.txt"
    changed.write_text(Path(subject.config.corpus).read_text() + "more of it\n")
    moved = dataclasses.replace(
        subject, config=dataclasses.replace(subject.config, corpus=str(changed))
    )
    with pytest.raises(RunError, match=r"is not what triple_momentum was trained on"):
        token_set(moved, tokens=64)
    assert token_set(moved, str(changed), tokens=64).tokens == 64
    silent = dataclasses.replace(subject, config=None)
    with pytest.raises(RunError, match=r"does not say which corpus"):
        token_set(silent, tokens=64)


def damage(folder: Path, what: str) -> None:
    if what == "cut weights":
        file = folder / "model" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "no weights":
        (folder / "model" / "model.safetensors").unlink()
    elif what == "no result":
        (folder / "result.json").unlink()
    elif what == "changed tokenizer":
        file = folder / "model" / "polyak_tokenizer.json"
        file.write_text(file.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    elif what == "settings of the wrong kind":
        (folder / "run.json").write_text('{"settings": 3}')
    elif what == "config of a rule that is gone":
        file = folder / "model" / "config.json"
        file.write_text(file.read_text().replace("triple_momentum", "quadruple_momentum"))
    elif what == "no JSON":
        (folder / "run.json").write_text("{")


@pytest.mark.parametrize(
    "what",
    [
        "cut weights",
        "no weights",
        "no result",
        "changed tokenizer",
        "settings of the wrong kind",
        "config of a rule that is gone",
        "no JSON",
    ],
)
def test_a_damaged_run_is_one_line(run: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    damage(folder, what)
    with pytest.raises(RunError) as caught:
        load_subject(folder)
    assert "\n" not in str(caught.value)
    assert "damaged" in str(caught.value)


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        load_subject(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is not a run"):
        load_subjects([tmp_path])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            load_subject(tmp_path, device="cuda")
