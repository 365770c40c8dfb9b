"""Training that starts from a finished model's weights, with fresh optimizers.

A run says where it started (`RunConfig.init`) and records the SHA-256 of those weights, so that it
is the same run only while they are the same bytes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.data.tokenizer_names import load_tokenizer
from polyak.data.tokenizers import Tokenizer
from polyak.errors import ConfigError, RunError
from polyak.files import sha256_of
from polyak.nn.config import ModelConfig
from polyak.nn.pieces import portable_values
from polyak.nn.rule_places import brackets_of, parts_of, text_of
from polyak.nn.transformer import Transformer
from polyak.training.runs.folder import check_finished, read_model_config, read_weights

FREE_TO_DIFFER = ("dropout", "embedding_std", "rule_options.frozen")
"""What training may change about a model without changing what its weights compute."""


def weights_file(folder: str | Path) -> Path:
    """The weights of a finished run.

    Raises:
        RunError: there are none, or the run did not finish.
    """
    check_finished(folder)
    file = Path(folder).expanduser() / "model" / "model.safetensors"
    if not file.is_file():
        raise RunError(
            f"init={str(folder)!r}: {file} is missing; name the folder of a finished run"
        )
    return file


def identity(folder: str | None) -> dict[str, Any] | None:
    """What identifies the initial weights in a run's settings; None for weights that are drawn."""
    return None if folder is None else {"weights": sha256_of(weights_file(folder))}


def initial_weights(
    folder: str | Path | None, config: ModelConfig, tokenizer: Tokenizer
) -> dict[str, Tensor] | None:
    """The weights of a finished run, for `Trainer(weights=...)`; None without a folder.

    Args:
        folder: the run's folder.
        config: of the model that is to be trained; must be the same architecture.
        tokenizer: of the text that it will be trained on.

    Raises:
        RunError: there is no finished run, or its weights are corrupt.
        ConfigError: another architecture, or another tokenizer; the first difference is named.
    """
    if folder is None:
        return None
    weights = read_weights(weights_file(folder))
    source = Path(folder).expanduser() / "model"
    _same_architecture(read_model_config(source), config, folder)
    trained_with = load_tokenizer(source)
    if trained_with.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"init={str(folder)!r} has tokenizer {trained_with.name!r}, this run another "
            f"({tokenizer.name!r}); use --tokenizer {source}"
        )
    if config.tie_embeddings and "embedding.tokens.weight" in weights:  # written once
        weights["head.weight"] = weights["embedding.tokens.weight"]
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Transformer(config).state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if wrong := sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name)):
        raise RunError(f"{source}: weights do not fit config.json ({wrong[0]})")
    return weights


def _same_architecture(there: ModelConfig, now: ModelConfig, folder: str | Path) -> None:
    theirs, ours = _flat(there), _flat(now)
    for name in sorted({*theirs, *ours} - set(FREE_TO_DIFFER)):
        if theirs.get(name) != ours.get(name):
            fix = (
                f"polyak upgrade {folder} turns it into another rule"
                if name == "rule"
                else "training can change dropout and which scalars are frozen, nothing else"
            )
            raise ConfigError(
                f"model.{name}={ours.get(name)!r} differs from {theirs.get(name)!r} of "
                f"init={str(folder)!r}; {fix}"
            )


def _without_frozen(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "frozen"}


def _flat(config: ModelConfig) -> dict[str, Any]:
    values = portable_values(config)
    tables = {name: values.pop(name) for name in ("rule_options", "attention_options")}
    options = {f"{of}.{name}": v for of, table in tables.items() for name, v in table.items()}
    values["rule"] = text_of(
        dataclasses.replace(part, brackets=brackets_of(_without_frozen(part.options)))
        for part in parts_of(values["rule"])
    )
    return values | options
