"""results.json and report.html of `polyak evaluate`: any runs on any corpora, side by side."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.data.left_out import lines
from polyak.errors import RunError
from polyak.evaluation.attention import SEQUENCES, attention_entropy
from polyak.evaluation.config import EvaluateConfig, corpora_of
from polyak.evaluation.losses import (
    Losses,
    by_position,
    difference,
    require_causal,
    summary,
    token_losses,
)
from polyak.evaluation.subjects import Subject, load_subjects, token_set
from polyak.files import make_folder, write_json
from polyak.report.pages import check_out, save
from polyak.study.evaluation.page import render
from polyak.training.machine import heading
from polyak.words import listed

KIND = "evaluation"
Progress = Callable[[float, str], None]
"""Called with the share of the work that is done, from 0 to 1, and with what is under way."""


def evaluate(
    runs: Sequence[Path],
    config: EvaluateConfig,
    *,
    command: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure runs on corpora into `config.out`; what is measured is written as it comes.

    Args:
        runs: runs, comparisons, or folders of runs; the first is what differences are from.
        config: what is measured, on what.
        command: the command line that repeats it.
        progress: see `Progress`.

    Returns:
        The content of results.json.

    Raises:
        RunError, DataError, ConfigError: a run or corpus cannot be used; nothing is left out.
    """
    check_out(config.out, KIND, command)
    subjects = load_subjects(runs, device=config.device)
    for subject in subjects:
        require_causal(subject)
    made = _Evaluation(subjects, config, command, progress)
    make_folder(config.out)
    return made.run()


class _Evaluation:
    """One call of `evaluate`: its results grow measurement by measurement."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        config: EvaluateConfig,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.subjects, self.config, self.progress = subjects, config, progress
        self.corpora = corpora_of(config.corpora)
        entropies = len(subjects) if config.attention_entropy else 0
        self.parts, self.done = len(subjects) * len(self.corpora) + entropies, 0
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(EvaluateConfig)}
        self.results: dict[str, Any] = {
            **heading(KIND, command, status="partial"),
            "settings": {**settings, "out": os.fspath(config.out)},
            "baseline": subjects[0].name,
            "entries": [{"name": subject.name} for subject in subjects],
            "runs": [{**about(subject), "corpora": [], "attention": None} for subject in subjects],
            "warnings": [],
        }

    def run(self) -> dict[str, Any]:
        """Everything, in order of the corpora."""
        for corpus in self.corpora:
            base: Losses | None = None
            for subject, row in zip(self.subjects, self.results["runs"], strict=True):
                losses = self._losses(subject, corpus)
                found: dict[str, Any] = {"name": corpus or losses.corpus, **summary(losses)}
                found["difference"] = None if base is None else difference(losses, base)
                if self.config.per_position:
                    found["by_position"] = by_position(losses)
                row["corpora"].append(found)
                base = losses if base is None else base
                self._save()
        if self.config.attention_entropy:
            for subject, row in zip(self.subjects, self.results["runs"], strict=True):
                try:
                    row["attention"] = self._entropy(subject)
                except RunError as error:  # the losses are there, and other runs may have one
                    row["attention_note"] = str(error)
                self._save()
        self.results["status"] = "complete"
        self.results["warnings"] = _warnings(self.results)
        save(self.config.out, self.results, render)
        return self.results

    def _losses(self, subject: Subject, corpus: str | None) -> Losses:
        config, length = self.config, subject.context_length
        scored = 0

        def tick(tokens: int) -> None:
            nonlocal scored
            scored += tokens
            self._tell(min(1.0, scored / config.tokens), f"{subject.name} on {corpus or 'its own'}")

        return token_losses(
            subject,
            corpus,
            tokens=config.tokens,
            stride=max(1, length // 2) if config.sliding_window else config.stride,
            split=config.split,
            text_field=config.text_field,
            encoding=config.encoding,
            tick=tick,
        )

    def _entropy(self, subject: Subject) -> dict[str, Any]:
        """On the first corpus."""
        blocks = token_set(
            subject,
            self.corpora[0],
            tokens=self.config.tokens,
            split=self.config.split,
            text_field=self.config.text_field,
            encoding=self.config.encoding,
        )
        sequences = 0

        def tick(count: int) -> None:
            nonlocal sequences
            sequences += count
            share = sequences / min(SEQUENCES, len(blocks.ids))
            self._tell(share, f"attention of {subject.name}")

        return {"corpus": blocks.corpus, **attention_entropy(subject, blocks.ids[:, :-1], tick)}

    def _tell(self, share: float, what: str) -> None:
        if self.progress is not None:
            self.progress((self.done + share) / self.parts, what)

    def _save(self) -> None:
        self.done += 1
        write_json(self.config.out / "results.json", self.results)


def about(subject: Subject) -> dict[str, Any]:
    """What a results file says of a run before anything is measured."""
    settings = subject.settings
    return {
        "name": subject.name,
        "folder": os.fspath(subject.folder),
        "rule": settings.get("model", {}).get("rule"),
        "seed": settings.get("training", {}).get("seed"),
        "trained_with": settings.get("training", {}).get("optimizer"),
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "context_length": subject.context_length,
        "tokenizer": subject.tokenizer.name,
    }


def _warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing rows."""
    runs = results["runs"]
    said = lines(runs)
    said += [f"{run['attention_note']}." for run in runs if run.get("attention_note")]
    for place, first in enumerate(runs[0]["corpora"]):
        other = [
            run["name"]
            for run in runs
            if run["corpora"][place]["fingerprint"] != first["fingerprint"]
        ]
        if other:
            said.append(
                f"On {first['name']}, {listed(other)} {'is' if len(other) == 1 else 'are'} scored "
                f"on other tokens than {runs[0]['name']} (another context, tokenizer or corpus): "
                "bits/byte can be set side by side with care, nats/token and perplexity cannot."
            )
        short = first["tokens"] < results["settings"]["tokens"] - first["context_length"]
        if short:
            said.append(
                f"{first['name']} has {first['tokens']:,} tokens to score, fewer than asked for."
            )
        if first["se_over"] is None:
            said.append(f"On {first['name']} there is one block: no standard error can be given.")
    return said
