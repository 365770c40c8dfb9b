"""Run folders of models that were not trained here, or not by one run: imported and upgraded."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyak.data.tokenizers import Tokenizer
from polyak.errors import RunError
from polyak.files import locked, make_folder, write_json
from polyak.nn.pieces import keep, other_sources, portable_values, source_hash
from polyak.nn.transformer import Transformer
from polyak.training.config.run import RunConfig
from polyak.training.processes.distributed import World
from polyak.training.runs.folder import RunFolder, save_model


def check_out(folder: Path) -> None:
    """Refuse a folder that holds something already.

    Raises:
        RunError: it holds a run, or is a file.
    """
    if folder.is_file():
        raise RunError(f"{folder} is a file; name a folder for the run")
    if RunFolder(folder).settings_file.exists() or (folder / "model").exists():
        raise RunError(f"{folder} holds a run already; choose another folder, or remove that one")


def write_run(
    folder: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    settings: dict[str, Any],
    config: RunConfig | None,
    result: dict[str, Any],
    left_out: Mapping[str, Any] | None = None,
) -> None:
    """Write a finished run: `run.json`, `model/`, and `result.json` last.

    Args:
        folder: where; must hold no run.
        model: its weights and configuration.
        tokenizer: its tokenizer.
        settings: where the model comes from and what it was trained with, where that is known;
            model and tokenizer are added.
        config: what further work on it takes its corpus from; None where that is unknown.
        result: content of `result.json`; `steps` and `loss` are None where unknown.
        left_out: files that the corpus does without that its loss was measured on.

    Raises:
        RunError: the folder holds a run, is in use, or cannot be written.
    """
    check_out(folder)
    make_folder(folder)
    with locked(folder, "polyak run"):
        identity = secrets.token_hex(16)
        keep(folder, model.config, run=identity)
        described = {
            **settings,
            "model": portable_values(model.config),
            "rule_source": source_hash(model.config.rule),
            **other_sources(model.config),
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        }
        run = RunFolder(folder)
        run.begin(described, config, left_out, identity=identity)
        save_model(model, tokenizer, folder / "model", World())
        write_json(run.result_file, {"steps": None, "loss": None, **result})
