"""Trained models to look at, and the fixed tokens they are looked at on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyak.data.batches import ValidationBatches
from polyak.data.prepare import Prepared, open_prepared, prepare, say_left_out
from polyak.data.shards import TokenFile
from polyak.data.tokenizers import ByteTokenizer, Tokenizer
from polyak.errors import ConfigError, DataError, PolyakError, RunError, unknown
from polyak.training.config.run import RunConfig
from polyak.training.runs.finding import find_runs, short_names
from polyak.training.runs.folder import RunFolder, load_run, read_run_config
from polyak.training.trainer import device_of
from polyak.trust import trusting

SPLITS = ("train", "validation", "test")
BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A trained model to look at.

    Attributes:
        name: a short label for tables: the folder's name, or as many parts as tell runs apart.
        folder: where it was read from.
        model: in evaluation mode, float32.
        tokenizer: the one it was trained with.
        settings: what made the run the run it is, `run.json`'s "settings".
        config: what the run was started with; None where the folder does not say.
    """

    name: str
    folder: Path
    model: nn.Module
    tokenizer: Tokenizer
    settings: dict[str, Any]
    config: RunConfig | None

    @property
    def context_length(self) -> int:
        """T, the longest sequence that the model takes."""
        return int(self.model.config.context_length)  # type: ignore[union-attr, arg-type]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def load_subject(folder: str | Path, *, device: str = "cpu", trust_code: bool = False) -> Subject:
    """A finished run of polyak as a subject.

    Args:
        folder: the run's folder.
        device: `cpu`, `cuda` or `auto`.
        trust_code: run the code of a rule that comes with the run and was not made here.

    Raises:
        RunError: not a finished run, or a file of it is missing or corrupt.
        TrustError: it brings code that was not made here.
        ConfigError: CUDA is asked for and there is none.
    """
    with trusting(trust_code):
        return _load_subject(Path(folder), device)


def _load_subject(folder: Path, device: str) -> Subject:
    place = device_of(device)
    if not folder.exists():
        raise RunError(f"{folder} does not exist")
    try:
        model, tokenizer = load_run(folder)
        settings, started = RunFolder(folder).recorded()["settings"], read_run_config(folder)
    except RunError:
        raise
    except (PolyakError, AttributeError, TypeError) as error:
        raise RunError(f"{folder} cannot be loaded: {error}") from error
    if model.config.vocab_size < tokenizer.vocab_size:
        raise RunError(
            f"{folder} cannot be loaded: its model has {model.config.vocab_size} ids, its "
            f"tokenizer {tokenizer.vocab_size}"
        )
    return Subject(
        name=folder.resolve().name,
        folder=folder,
        model=model.float().to(place).eval(),
        tokenizer=tokenizer,
        settings=settings,
        config=started,
    )


def load_subjects(
    folders: Iterable[str | Path], *, device: str = "cpu", trust_code: bool = False
) -> list[Subject]:
    """Several subjects with distinct names; a comparison stands for its runs.

    Raises:
        RunError: a folder is no run and holds none, or a run is not finished or corrupt.
    """
    found = find_runs(map(Path, folders))
    return [
        replace(load_subject(folder, device=device, trust_code=trust_code), name=name)
        for folder, name in zip(found, short_names(found), strict=True)
    ]


@dataclass(frozen=True)
class TokenSet:
    """Fixed tokens: evenly spaced, non-overlapping blocks of one side of a corpus.

    Attributes:
        ids: (N, T+1) int64; inputs are `[:, :-1]`, targets `[:, 1:]`.
        corpus: the corpus's name.
        split: the side: `train`, `validation` or `test`.
        fingerprint: SHA-256 of the blocks, as a run's validation set has it.
        bytes: bytes of text that the targets stand for.
        left_out: files that the corpus does without, by reason, see `Prepared.left_out`.
    """

    ids: Tensor
    corpus: str
    split: str
    fingerprint: str
    bytes: int
    left_out: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of targets, N·T."""
        return len(self.ids) * (self.ids.shape[1] - 1)


def token_set(
    subject: Subject,
    corpus: str | None = None,
    *,
    tokens: int,
    length: int | None = None,
    split: str = "validation",
    text_field: str = "text",
    encoding: str = "utf-8",
) -> TokenSet:
    """Blocks of a corpus, cut as every validation set of polyak is; nothing about them is random.

    Args:
        subject: whose tokenizer cuts the text into tokens.
        corpus: see `corpus_of`. With None, `tokens` as the run's `eval_tokens` and no `length`,
            these are the run's own validation blocks.
        tokens: at most this many targets; all there are, if that is fewer.
        length: T; the model's context when left out.
        split: `train`, `validation` or `test`.
        text_field: the field with the text of JSONL, Parquet and hub records.
        encoding: of text files and JSON.

    Raises:
        ConfigError: `tokens` is less than one block, or `length` longer than the context.
        DataError: the corpus is missing, too short, or has another tokenizer.
        RunError: the run's own corpus is not what it was.
    """
    length = subject.context_length if length is None else length
    if not 1 <= length <= subject.context_length:
        raise ConfigError(
            f"length={length} must be from 1 to the model's context_length={subject.context_length}"
        )
    if tokens < length:
        raise ConfigError(
            f"tokens={tokens} is less than one block of {length} tokens; use at least {length}"
        )
    prepared = corpus_of(subject, corpus, text_field=text_field, encoding=encoding)
    blocks = ValidationBatches(side_of(prepared, split), length, BATCH, tokens)
    return TokenSet(
        ids=torch.from_numpy(np.concatenate(list(blocks))),
        corpus=corpus_name(prepared),
        split=split,
        fingerprint=blocks.fingerprint,
        bytes=blocks.bytes,
        left_out=prepared.left_out,
    )


def corpus_of(
    subject: Subject,
    corpus: str | None = None,
    *,
    text_field: str = "text",
    encoding: str = "utf-8",
) -> Prepared:
    """A corpus in the subject's tokens, prepared if it is not yet.

    Args:
        subject: whose tokenizer is used.
        corpus: a name, a path to text, or a folder that `polyak prepare` wrote; None: the corpus
            that the run was trained on, which must not have changed.
        text_field: see `prepare`; the run's own corpus has its own.
        encoding: as text_field.

    Raises:
        DataError: the corpus is missing or empty, or was prepared with another tokenizer.
        RunError: the run's own corpus is not what it was, or the run does not say which it is.
    """
    if corpus is None:
        return _own_corpus(subject)
    if (Path(corpus) / "manifest.json").is_file():
        prepared = open_prepared(Path(corpus))
        if prepared.tokenizer.fingerprint != subject.tokenizer.fingerprint:
            raise DataError(
                f"{corpus} was prepared with tokenizer {prepared.tokenizer.name!r}, but "
                f"{subject.name} was trained with {subject.tokenizer.name!r}, which is another; "
                f"prepare it with --tokenizer {subject.folder / 'model'}"
            )
        say_left_out(corpus_name(prepared), prepared.left_out)
        return prepared
    bytewise = subject.tokenizer.fingerprint == ByteTokenizer.fingerprint
    tokenizer = ByteTokenizer.name if bytewise else str(subject.folder / "model")
    reading = {} if subject.config is None else subject.config.reading  # the run's own split
    return prepare(corpus, tokenizer, **{**reading, "text_field": text_field, "encoding": encoding})


def _own_corpus(subject: Subject) -> Prepared:
    config, recorded = subject.config, subject.settings.get("corpus")
    if config is None or not isinstance(recorded, dict):
        raise RunError(
            f"{subject.folder} does not say which corpus it was trained on; name "
            "one with --corpus (--corpora in polyak evaluate)"
        )
    prepared = prepare(config.corpus, config.tokenizer, **config.reading)
    if prepared.fingerprint != recorded.get("fingerprint"):
        raise RunError(
            f"corpus {config.corpus!r} is not what {subject.name} was trained on: its fingerprint "
            f"is {prepared.fingerprint[:12]}… now, {str(recorded.get('fingerprint'))[:12]}… in "
            "run.json; name a corpus to use it all the same"
        )
    return prepared


def side_of(prepared: Prepared, split: str) -> TokenFile:
    """The tokens of one side.

    Raises:
        UnknownNameError: there is no side of that name.
        DataError: this corpus does not have that side.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    side: TokenFile | None = getattr(prepared, split)
    if side is None:
        raise DataError(f"corpus {corpus_name(prepared)!r} has no {split} side; use validation")
    return side


def corpus_name(prepared: Prepared) -> str:
    """The name of a prepared corpus."""
    return str(prepared.manifest["corpus"]["name"])
