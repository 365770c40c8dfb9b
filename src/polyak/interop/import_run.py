"""Models that were trained elsewhere, as run folders that everything else accepts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyak.data.prepare import Prepared, prepare
from polyak.data.tokenizer_names import GPT2, GPT2_SIZE, parse_name
from polyak.data.tokenizers import ByteTokenizer, Tokenizer
from polyak.errors import ConfigError, RunError
from polyak.files import sha256_of
from polyak.interop import hub_folders, released_files
from polyak.interop.made_runs import check_out, write_run
from polyak.nn.rule_text import RuleText
from polyak.nn.transformer import Transformer
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig
from polyak.training.trainer import device_of, validation_loss, validation_set

PADDED_GPT2 = 50_304
"""The release's vocabulary: GPT-2's 50,257 tokens, padded for the sake of the hardware."""


@dataclass(frozen=True)
class Found:
    """A model that was read from elsewhere.

    Attributes:
        model: in evaluation mode, float32.
        tokenizer: name or path of its tokenizer.
        about: what run.json records under "imported".
        steps: optimizer steps taken, where known.
        loss: validation loss as stated, where known.
        notes: lines for the user.
    """

    model: Transformer
    tokenizer: str
    about: dict[str, Any]
    steps: int | None = None
    loss: float | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def import_run(
    source: str,
    out: Path,
    *,
    rule: RuleText | None = None,
    tokenizer: str | None = None,
    num_heads: int | None = None,
    corpus: str | None = None,
    text_field: str = "text",
    encoding: str = "utf-8",
    tokens: int = 32_768,
) -> tuple[Found, float | None]:
    """Import a model into a new run folder.

    Args:
        source: a released checkpoint's file; or a folder or hub name in Hugging Face's format.
        out: the new run's folder.
        rule: of a released checkpoint, where its weights leave it open or to insist on it.
        tokenizer: `gpt2`, `bytes` or a path; None: told by the folder or the vocabulary's size.
        num_heads: of a released checkpoint, where it is not d/64.
        corpus: text to measure the loss on.
        text_field: field with the text in JSONL and Parquet.
        encoding: of text files and JSON.
        tokens: validation tokens to measure on.

    Returns:
        What was found, and the loss on `corpus`, nats/token.

    Raises:
        RunError: nothing that can be imported, damaged, or `out` holds a run.
        ConfigError: options that don't fit, or something this package cannot compute.
        DataError: no such tokenizer or corpus.
    """
    check_out(out)
    path = Path(source).expanduser()
    if path.is_file():
        found = _released(path, rule, tokenizer, num_heads)
    elif not path.is_dir() and not _hub_name(source):
        raise RunError(f"{source} does not exist")
    elif rule is not None or num_heads is not None:
        option = "--rule" if rule is not None else "--num-heads"
        raise ConfigError(
            f"{option} is for released checkpoint files, and {source} is none; leave it out"
        )
    else:
        found = _hugging_face(
            source, path if path.is_dir() else hub_folders.fetch(source), tokenizer
        )
    named = parse_name(found.tokenizer)
    if named.size is not None:
        raise ConfigError(f"tokenizer {found.tokenizer!r} would be trained anew; give its folder")
    loaded = named.load()
    _check_vocabulary(found.model, loaded)
    loss, config, left_out = None, None, None
    settings = {"imported": dict(found.about), "rule_source": None}
    if corpus is not None:
        training = TrainingConfig(eval_tokens=max(tokens, found.model.config.context_length))
        config = RunConfig(
            model=found.model.config,
            training=training,
            corpus=corpus,
            text_field=text_field,
            encoding=encoding,
            tokenizer=found.tokenizer,
        )
        data = prepare(corpus, found.tokenizer, **config.reading)
        loss, measured = _measure(found.model, config, data)
        settings |= measured
        left_out = data.left_out
    write_run(
        out,
        found.model,
        loaded,
        settings=settings,
        config=config,
        result={"steps": found.steps, "loss": found.loss if loss is None else loss},
        left_out=left_out,
    )
    return found, loss


def _hub_name(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def _released(
    file: Path, rule: RuleText | None, tokenizer: str | None, num_heads: int | None
) -> Found:
    released = released_files.read(file)
    model = released_files.build(released, rule, num_heads)
    config = model.config
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in released.state.values()})
    notes = []
    if num_heads is None and released.config is None:
        notes.append(
            f"{config.num_heads} heads, taken from d_model={config.d_model} and the release's head "
            "width of 64: weights do not tell; --num-heads says otherwise"
        )
    if "float64" in dtypes:
        notes.append("weights in float64 were rounded to float32")
    if released.left_out:
        notes.append(f"not used: {', '.join(released.left_out)}")
    about = {
        "from": str(file.resolve()),
        "sha256": sha256_of(file),
        "format": f"released, {released.format}",
        "dtypes": dtypes,
        "num_heads": "given" if num_heads else "recorded" if released.config else "d_model / 64",
        "rule": "given" if rule else "recorded" if released.config else "detected",
        "stated_val_loss": released.val_loss,
        "not_used": list(released.left_out),
    }
    return Found(
        model=model,
        tokenizer=tokenizer or _usual_tokenizer(config.vocab_size),
        about=about,
        steps=released.step,
        loss=released.val_loss,
        notes=notes,
    )


def _hugging_face(source: str, folder: Path, tokenizer: str | None) -> Found:
    model, described = hub_folders.load(folder)
    config = model.config
    about = {
        "from": source if not Path(source).expanduser().is_dir() else str(folder.resolve()),
        "format": f"Hugging Face, {described['model_type']}",
        "dtypes": [hub_folders.described_dtype(described)],
        "sha256": {file.name: sha256_of(file) for file in hub_folders.weight_files(folder)},
    }
    notes = []
    stated = described.get("max_position_embeddings")
    if isinstance(stated, int) and stated > config.context_length:
        notes.append(
            f"context {config.context_length:,} instead of {stated:,}: up to there the model's "
            "sliding window hides nothing"
        )
    return Found(model=model, tokenizer=tokenizer or str(folder), about=about, notes=notes)


def _usual_tokenizer(vocab_size: int) -> str:
    if vocab_size in (PADDED_GPT2, GPT2_SIZE):
        return GPT2
    if vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer.name
    raise ConfigError(
        f"a vocabulary of {vocab_size} does not tell its tokenizer; give --tokenizer gpt2, bytes, "
        "or a tokenizer's folder"
    )


def _check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> None:
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; give the model's own with --tokenizer"
        )


def _measure(model: Transformer, config: RunConfig, data: Prepared) -> tuple[float, dict[str, Any]]:
    validation = validation_set(config, data)
    loss = validation_loss(model, validation, device_of("cpu"))
    return loss, {
        "corpus": {"name": data.manifest["corpus"]["name"], "fingerprint": data.fingerprint},
        "validation": {
            "fingerprint": validation.fingerprint,
            "tokens": validation.tokens,
            "bytes": validation.bytes,
        },
    }
