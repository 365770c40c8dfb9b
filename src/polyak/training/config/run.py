"""`RunConfig`: one run — model, recipe, data and device. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from polyak.checks import check_whole
from polyak.data.split import NEAR, SPLIT, check_split
from polyak.errors import ConfigError, shown_value, unknown
from polyak.nn.config import ModelConfig
from polyak.settings import check_keys, typed
from polyak.training.config.training import TrainingConfig

Device = Literal["auto", "cpu", "cuda"]
Parallel = Literal["auto", "none", "ddp", "fsdp"]
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that defines one run.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    corpus: str = "stdlib"
    """A corpus by name, see `polyak prepare --help`, or a path to text files, a folder, JSONL or
    Parquet."""
    text_field: str = "text"
    """Field that holds the text in JSONL and Parquet."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON, such as `latin-1`."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe-N` trained on the corpus with N tokens, `gpt2`, or the path of a tokenizer."""
    split: int = SPLIT
    """Version of the rule that holds documents out: 1 looks at names (of files) or contents alone;
    2 keeps equal texts on one side. A run keeps the one it was made with."""
    near_duplicates: float = NEAR
    """Of a held-out document, the share of its 200-byte windows that may occur in training; with
    more in common it is left out. Not looked for in corpora of the hub."""
    init: str | None = None
    """A finished run whose weights training starts from; None: weights are drawn."""
    device: Device = "auto"
    """`cuda` trains under bfloat16 autocast, `cpu` in float32; `auto` takes CUDA if there is."""
    parallel: Parallel = "auto"
    """How processes started by torchrun share the work: `ddp` copies the model, `fsdp` shards it;
    `auto`: ddp with several processes."""
    trackers: tuple[str, ...] = ()
    """Where metrics go besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`."""
    threads: int | None = None
    """CPU threads; None leaves torch's own choice."""

    def __post_init__(self) -> None:
        for name, kind in (("device", Device), ("parallel", Parallel)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))
        object.__setattr__(self, "trackers", tuple(self.trackers))
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise unknown("tracker", str(tracker), TRACKERS)
        check_whole("threads", self.threads, optional=True)
        check_split(self.split, self.near_duplicates)

    @property
    def reading(self) -> dict[str, Any]:
        """How the corpus is read: arguments of `polyak.data.prepare.prepare`."""
        return {
            "text_field": self.text_field,
            "encoding": self.encoding,
            "split": self.split,
            "near_duplicates": self.near_duplicates,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **values,
            "model": self.model.to_dict(),
            "training": self.training.to_dict(),
            "trackers": list(self.trackers),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Back from `to_dict`.

        Raises:
            UnknownNameError: a key is not a field; the nearest is offered.
        """
        check_keys(cls, values, "run setting")
        for name in ("model", "training"):
            if not isinstance(values.get(name), Mapping):
                found = shown_value(values.get(name))
                raise ConfigError(f"{name}={found} must be the settings of the {name}")
        return cls(
            **{
                **typed(cls, values),
                "model": ModelConfig.from_dict(values["model"]),
                "training": TrainingConfig.from_dict(values["training"]),
            }
        )
