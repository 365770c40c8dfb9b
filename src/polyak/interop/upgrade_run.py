"""A run folder upgraded into another: loads, measures and writes what `interop.upgrade` makes."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.data.left_out import skipped_files
from polyak.errors import RunError
from polyak.evaluation.subjects import TokenSet, load_subject, token_set
from polyak.interop.made_runs import check_out, write_run
from polyak.interop.upgrade import upgrade
from polyak.nn.rule_text import RuleText
from polyak.nn.transformer import Transformer
from polyak.training.initial import identity
from polyak.training.runs.folder import RunFolder

ROWS = 8
"""Sequences at once when the loss is measured."""


def upgrade_run(
    folder: Path,
    out: Path,
    wanted: RuleText,
    *,
    corpus: str | None = None,
    text_field: str = "text",
    encoding: str = "utf-8",
    tokens: int = 8192,
    seed: int = 0,
) -> dict[str, Any]:
    """Upgrade the model of a finished run into a new run folder.

    Args:
        folder: the run, of rule gradient_descent.
        out: the new run's folder.
        wanted: the rule with its options.
        corpus: text to fit and measure on; None: the run's own.
        text_field: field with the text in JSONL, Parquet and hub records.
        encoding: of text files and JSON.
        tokens: how much to fit on, and to measure on.
        seed: of new tables.

    Returns:
        What run.json records under "upgrade": `exact`, the losses, where they were measured.

    Raises:
        RunError: no finished run, `out` holds one, or gains must be fitted and there is no text.
        ConfigError, RuleError: see `interop.upgrade.upgrade`.
    """
    check_out(out)
    subject = load_subject(folder)
    source = subject.model
    assert isinstance(source, Transformer)
    known = corpus is not None or subject.config is not None
    reading: dict[str, Any] = {"text_field": text_field, "encoding": encoding}
    measured = token_set(subject, corpus, tokens=tokens, **reading) if known else None
    fitted: TokenSet | None = None

    def text() -> Tensor:
        nonlocal fitted
        if not known:
            raise RunError(
                f"{folder} does not say which corpus it was trained on, and rule {wanted.label} "
                "must be fitted on text; name one with --corpus"
            )
        fitted = token_set(subject, corpus, tokens=tokens, split="train", **reading)
        return fitted.ids[:, :-1]

    made = upgrade(source, wanted, text, seed)
    before = None if measured is None else loss_of(source, measured.ids)
    after = None if measured is None else loss_of(made.model, measured.ids)
    about = {
        "from": str(folder.resolve()),
        **(identity(str(folder)) or {}),
        "exact": made.exact,
        "loss_before": before,
        "loss_after": after,
        "measured_on": _described(measured),
        "fitted_on": _described(fitted),
        "mean_miss": statistics.fmean(made.misses) if made.misses else None,
        "misses": list(made.misses),
        "seed": seed,
    }
    previous = RunFolder(folder).result()
    assert previous is not None  # a subject is a finished run
    config = subject.config
    if config is not None:
        config = dataclasses.replace(config, model=made.model.config)
    write_run(
        out,
        made.model,
        subject.tokenizer,
        settings={**subject.settings, "upgrade": about},
        config=config,
        result={
            "steps": previous["steps"],
            "tokens": previous.get("tokens"),
            "loss": previous["loss"] if after is None else after,
        },
        left_out=None if measured is None else measured.left_out,
    )
    return about


@torch.no_grad()
def loss_of(model: Transformer, ids: Tensor) -> float:
    """Mean loss of token ids (N, T+1), nats/token."""
    total = sum(
        float(F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).double())
        * rows[:, 1:].numel()
        for rows in torch.split(ids, ROWS)
    )
    return total / ids[:, 1:].numel()


def _described(found: TokenSet | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "corpus": found.corpus,
        **skipped_files(found.left_out),
        "split": found.split,
        "tokens": found.tokens,
        "fingerprint": found.fingerprint,
    }
