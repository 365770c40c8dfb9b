"""Released checkpoint files: read without running code, verified, and written back.

Two formats: a bare state dict, and a dict with `model`, `step`, `val_loss` and optimizer entries.
Names may carry the prefixes that torch.compile (`_orig_mod.`) and DataParallel (`module.`) leave.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from polyak.errors import RunError
from polyak.files import write_atomic
from polyak.interop.detect import detect
from polyak.interop.release import load_state_dict, to_state_dict
from polyak.interop.safe_pickle import load_pickle
from polyak.nn.config import ModelConfig
from polyak.nn.rule_text import RuleText
from polyak.nn.transformer import Transformer

Format = Literal["bare", "training"]
PREFIXES = ("_orig_mod", "module")
CONFIG = "polyak_config"
"""Entry of a training checkpoint in which polyak says what the weights do not."""


@dataclass(frozen=True)
class Released:
    """What a released checkpoint file holds.

    Attributes:
        state: weights by released name, without prefixes.
        format: which of the two formats.
        step: optimizer steps taken, where it says so.
        val_loss: validation loss, where it says so.
        left_out: entries that are not weights and are not used.
        config: polyak's own record of the model, where polyak wrote the file.
    """

    state: dict[str, Tensor]
    format: Format
    step: int | None = None
    val_loss: float | None = None
    left_out: tuple[str, ...] = ()
    config: ModelConfig | None = None


def read(file: Path) -> Released:
    """Read a released checkpoint; nothing in it is ever run.

    Raises:
        RunError: missing, cut short, something else, or holding code instead of weights.
    """
    if file.suffix == ".safetensors":
        raise RunError(
            f"{file} is of safetensors, and a released checkpoint is of torch.save; of a model in "
            "Hugging Face's format, name the folder"
        )
    content = load_pickle(file)
    if not isinstance(content, Mapping) or not content:
        kind = type(content).__name__ if not isinstance(content, Mapping) else "empty dict"
        raise RunError(f"{file} is not a released checkpoint: it holds a {kind}, not weights")
    if not isinstance(content.get("model"), Mapping):
        return Released(_weights(content, file), "bare")
    step, loss = _number(content.get("step")), _number(content.get("val_loss"))
    config = content.get(CONFIG)
    if isinstance(config, Mapping) and ":" in str(config.get("rule")):
        raise RunError(
            f"{file} is of a rule in a file, {config.get('rule')}, which is not loaded at a "
            "checkpoint's word; register the rule by a name and write the checkpoint again"
        )
    return Released(
        state=_weights(content["model"], file),
        format="training",
        step=None if step is None else int(step),
        val_loss=loss,
        left_out=tuple(sorted(map(str, content.keys() - {"model", "step", "val_loss", CONFIG}))),
        config=ModelConfig.from_dict(config) if isinstance(config, Mapping) else None,
    )


def _number(value: Any) -> float | None:
    """A finite number, also one that was saved as a tensor; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


def _weights(state: Mapping[Any, Any], file: Path) -> dict[str, Tensor]:
    """Weights without prefixes; all must be finite floating-point tensors."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RunError(
                f"{file} is not a released checkpoint: entry {name!r} is a "
                f"{type(value).__name__}, not a weight"
            )
        plain = ".".join(part for part in name.split(".") if part not in PREFIXES)
        if plain in found:
            raise RunError(f"{file} has weight {plain!r} twice, with and without a prefix")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise RunError(f"{file}: weight {plain!r} is {value.dtype}, not floating point")
        if not value.isfinite().all():
            raise RunError(f"{file}: weight {plain!r} is not finite everywhere")
        found[plain] = value
    return found


def build(
    released: Released, wanted: RuleText | None = None, num_heads: int | None = None
) -> Transformer:
    """The model of a released checkpoint, in evaluation mode.

    Args:
        released: as read.
        wanted: the rule, where the user names it.
        num_heads: H, where the user names it.

    Raises:
        RunError, ConfigError: see `detect` and `release.load_state_dict`.
    """
    recorded = released.config if wanted is None and num_heads is None else None
    config = recorded or detect(released.state, wanted, num_heads)
    model = Transformer(config)
    load_state_dict(model, released.state)
    return model.eval()


def write(
    model: Transformer,
    file: Path,
    format: Format = "bare",
    *,
    step: int | None = None,
    val_loss: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write a released checkpoint, all or nothing.

    Args:
        model: must be one that the release has.
        file: where.
        format: `training` adds `step`, `val_loss` and the configuration.
        step: optimizer steps taken.
        val_loss: validation loss, nats/token.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ConfigError: the release has no such model.
        RunError: the file is there, or cannot be written.
    """
    if file.is_dir():
        raise RunError(f"{file} is a folder; name a file, as best.pt")
    if file.exists() and not overwrite:
        raise RunError(f"{file} is there already; choose another name, or add --overwrite")
    state: dict[str, Any] = {k: v.contiguous().cpu() for k, v in to_state_dict(model).items()}
    if format == "training":
        known = val_loss is not None and math.isfinite(val_loss)
        state = {
            "model": state,
            "step": step,
            "val_loss": val_loss if known else None,
            CONFIG: model.config.to_dict(),
        }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(file, buffer.getvalue())
