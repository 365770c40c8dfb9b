"""`polyak import`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.checks import check_whole
from polyak.cli._options import parse
from polyak.output import say

DESCRIPTION = """Take in a model that was trained elsewhere as a run: a released checkpoint of
arXiv:2605.24425 (a state dict, or one with step, val_loss and optimizer), or
GPT-2 and Llama weights from a folder or the hub. Nothing in a file is run.

examples:
  polyak import best.pt runs/released
  polyak import best.pt runs/released --rule triple_momentum --tokenizer gpt2
  polyak import ~/models/gpt2 runs/gpt2 --corpus ~/texts
  polyak import openai-community/gpt2 runs/gpt2"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """What is imported, and where it goes."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A checkpoint file; or a folder or hub name in Hugging Face's format."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the run."""
    rule: str | None = None
    """Rule of a released checkpoint. Default: told by its weights."""
    tokenizer: str | None = None
    """`gpt2`, `bytes`, or a tokenizer's folder. Default: the folder's own; of a
    released checkpoint, the one with its vocabulary's size."""
    num_heads: int | None = None
    """Attention heads of a released checkpoint. Default: one per 64 of its width."""
    corpus: str | None = None
    """Text to measure the loss on, by name or path. Default: it is not measured."""
    text_field: str = "text"
    """Field that holds the text in JSONL and Parquet."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON, such as `latin-1`."""
    tokens: int = 32_768
    """Validation tokens to measure on."""
    trust_code: bool = False
    """Run the code of a rule that comes with it; that of what was made here needs no word."""

    def __post_init__(self) -> None:
        check_whole("num_heads", self.num_heads, optional=True)
        check_whole("tokens", self.tokens)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(ImportConfig, "import", words, DESCRIPTION)
    from polyak.interop.import_run import import_run
    from polyak.nn.rule_text import parse_rule

    found, loss = import_run(
        config.source,
        config.out,
        rule=None if config.rule is None else parse_rule(config.rule, "--rule"),
        tokenizer=config.tokenizer,
        num_heads=config.num_heads,
        corpus=config.corpus,
        text_field=config.text_field,
        encoding=config.encoding,
        tokens=config.tokens,
    )
    model = found.model.config
    count = sum(parameter.numel() for parameter in found.model.parameters())
    start = "" if model.stream_start is None else f"[stream_start={model.stream_start}]"
    say(
        f"{model.rule}{start}: {model.num_layers} layers, {model.num_heads} heads, "
        f"d_model {model.d_model}, context {model.context_length:,}, vocabulary "
        f"{model.vocab_size:,}; {count:,} parameters, all finite and used"
    )
    for note in found.notes:
        say(f"Careful: {note}")
    if loss is not None:
        say(f"Validation loss {loss:.4f} nats/token on {config.corpus}")
    elif found.loss is not None:
        say(f"Validation loss {found.loss:.4f} as the file states it, not measured here")
    say(f"Run: {config.out}")
    return 0
