"""`RunConfig`: one run — model, recipe, data and device. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from polyak.nn.config import ModelConfig
from polyak.training.config import TrainingConfig

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that defines one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    corpus: str = "stdlib"
    """Corpus name, or path to text files, a folder, JSONL or Parquet."""
    text_field: str = "text"
    """Field that holds the text in JSONL and Parquet."""
    tokenizer: str = "bytes"
    """`bytes`, or `bpe-N` trained on the corpus with N tokens."""
    device: Device = "auto"
    """`cuda` trains under bfloat16 autocast, `cpu` in float32; `auto` takes CUDA if there is."""
    threads: int | None = None
    """CPU threads; None leaves torch's own choice."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "model": self.model.to_dict(), "training": self.training.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Back from `to_dict`."""
        return cls(
            **{
                **values,
                "model": ModelConfig.from_dict(values["model"]),
                "training": TrainingConfig.from_dict(values["training"]),
            }
        )
