"""The options of commands that look at a run's own corpus or at another one. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from polyak.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Which corpus, and how it is read."""

    corpus: str | None = None
    """A corpus's name, a path to text, or a folder of `polyak prepare`; default: each run's own."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and hub records of --corpus."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON of --corpus, such as `latin-1`."""

    def check_corpus(self) -> None:
        """See that a way of reading is given for a corpus that is named.

        Raises:
            ConfigError: it is for none: a run's own corpus is read as it was in training.
        """
        for field in dataclasses.fields(CorpusConfig):
            value = getattr(self, field.name)
            if self.corpus is None and value != field.default:
                raise ConfigError(
                    f"{field.name}={value!r} is for a corpus named with --corpus; a run's own is "
                    "read as it was in training"
                )

    @property
    def reading(self) -> dict[str, Any]:
        """How it is read, as `polyak.evaluation.subjects.token_set` takes it."""
        return {"text_field": self.text_field, "encoding": self.encoding}
