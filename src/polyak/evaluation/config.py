"""What `polyak evaluate` and `polyak forgetting` are asked for. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from polyak.checks import check_number, check_whole
from polyak.errors import ConfigError, unknown
from polyak.training.config.run import Device
from polyak.training.config.training import Optimizer, TrainingConfig

Split = Literal["train", "validation", "test"]
OWN = "own"
"""The name that stands for the corpus a run was trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured, on what.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    corpora: str = OWN
    """Corpora separated by commas: names, paths to text, or folders of `polyak prepare`; `own`:
    what each run was trained on."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and hub records."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON, such as `latin-1`."""
    split: Split = "validation"
    """The side of the corpora: `validation`, `train` or `test`."""
    tokens: int = 65_536
    """Tokens that are scored on each corpus at most, in evenly spaced blocks."""
    stride: int | None = None
    """Slide the window by so many tokens: each token is scored once, with at least T − stride
    tokens before it. Default: blocks of T tokens, each begun without context."""
    sliding_window: bool = False
    """The same with a stride of half the context."""
    per_position: bool = False
    """Also the loss at each position of a block."""
    attention_entropy: bool = False
    """Also the entropy of attention by layer and head."""
    device: Device = "auto"
    """`cpu`, `cuda` or `auto`."""
    out: Path = Path("runs/evaluate")
    """Folder for report.html and results.json."""

    def __post_init__(self) -> None:
        check_whole("tokens", self.tokens)
        check_whole("stride", self.stride, optional=True)
        for name, kind in (("split", Split), ("device", Device)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))
        if self.stride is not None and self.sliding_window:
            raise ConfigError(
                f"sliding_window=True is a stride of half the context, and stride={self.stride} "
                "another; leave out one"
            )
        if self.per_position and (self.stride is not None or self.sliding_window):
            raise ConfigError(
                "per_position=True is the loss along plain blocks; leave out --stride and "
                "--sliding-window"
            )
        corpora_of(self.corpora)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgettingConfig:
    """How a trained model is trained on, and on what.

    The defaults are the published protocol but for `batch_size`, which is 480 there.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    onto: str = ""
    """The other corpus: a name, a path to text, or a folder of `polyak prepare`. It has to be
    given."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and hub records."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON, such as `latin-1`."""
    steps: int = 1000
    """Optimizer steps on the other corpus."""
    optimizer: Optimizer = "adamw"
    """`adamw` for all weights; `muon`: Muon for the matrices inside blocks, AdamW for the rest."""
    lr: float = 1e-4
    """Peak rate of AdamW."""
    muon_lr: float = 1e-3
    """Peak rate of Muon, with --optimizer muon."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices and embeddings; norms and scalars have none."""
    warmup: int = 50
    """Steps over which rates rise from 0; then a cosine to a tenth of the peak."""
    batch_size: int = 8
    """Sequences per step; 480 as published."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; default: the whole batch."""
    eval_every: int | None = None
    """Steps between validations on both corpora; default: a tenth of the steps."""
    eval_tokens: int = 32_768
    """Tokens that both losses are measured on at most."""
    seed: int = 0
    """Seeds the order of the batches, which is the same for all runs."""
    device: Device = "auto"
    """`cpu`, `cuda` or `auto`."""
    out: Path = Path("runs/forgetting")
    """Folder for report.html and results.json; started again, what is finished is kept."""

    def __post_init__(self) -> None:
        if not self.onto.strip():
            raise ConfigError("onto: no corpus is named to train on; add --onto CORPUS")
        for name in ("steps", "batch_size", "eval_tokens"):
            check_whole(name, getattr(self, name))
        for name in ("warmup", "seed"):
            check_whole(name, getattr(self, name), 0)
        for name in ("eval_every", "micro_batch_size"):
            check_whole(name, getattr(self, name), optional=True)
        for name in ("lr", "muon_lr", "weight_decay"):
            check_number(name, getattr(self, name))
        for name, kind in (("optimizer", Optimizer), ("device", Device)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))
        if self.warmup > self.steps:
            raise ConfigError(
                f"warmup={self.warmup} is longer than steps={self.steps}; make it shorter, such as "
                f"--warmup {self.steps // 20}"
            )
        self.training()

    def training(self) -> TrainingConfig:
        """The same as a recipe."""
        return TrainingConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            optimizer=self.optimizer,
            schedule="cosine",
            warmup=self.warmup / self.steps,
            final_rate=0.1,
            muon_lr=self.muon_lr,
            adam_lr=self.lr,
            scalar_lr=self.lr,
            adam_betas=(0.9, 0.95),
            weight_decay=self.weight_decay,
            eval_every=self.eval_every or max(1, self.steps // 10),
            eval_tokens=self.eval_tokens,
            seed=self.seed,
        )

    def protocol(self) -> dict[str, Any]:
        """What makes two measurements the same experiment, for JSON."""
        left_out = ["device", "out", "micro_batch_size"]
        if self.encoding == "utf-8":  # as before there was a choice
            left_out.append("encoding")
        names = [f.name for f in dataclasses.fields(ForgettingConfig) if f.name not in left_out]
        return {name: getattr(self, name) for name in names}


def corpora_of(text: str) -> tuple[str | None, ...]:
    """Corpora separated by commas outside brackets, each once; None stands for a run's own.

    Raises:
        ConfigError: there is none.
    """
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
    if not parts:
        raise ConfigError("corpora: nothing to evaluate on; name at least one corpus, or 'own'")
    return tuple(None if part == OWN else part for part in dict.fromkeys(parts))
