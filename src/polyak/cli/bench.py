"""`polyak bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from polyak import formats
from polyak.checks import check_whole
from polyak.cli._options import parse
from polyak.errors import ConfigError

DESCRIPTION = """Time forward + backward of every rule's model, of every numerical kernel in its
fast and its reference form, and of ways to compute the loss of a large
vocabulary, interleaved, in float32; or generation of text; or linear attention,
with and without momentum, beside softmax. Let nothing else run meanwhile.

examples:
  polyak bench
  polyak bench --what models --rules gradient_descent,triple_momentum \\
    --rounds 20
  polyak bench --what ops --out runs/bench
  polyak bench --what loss --vocab-size 50304
  polyak bench --what generate --num-layers 4 --num-heads 4 --d-model 128 \\
    --context-length 1024
  polyak bench --what generate --no-gpt2 --num-layers 4 --num-heads 4 \\
    --d-model 128 --context-length 10240 \\
    --rules "gradient_descent,gradient_descent[attention=momentum]"
  polyak bench --what attention --num-heads 4 --d-model 128 \\
    --lengths 1024,4096 --batch-size 4"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What is timed, at which size and how often."""

    what: Literal["all", "models", "ops", "loss", "generate", "attention"] = "all"
    """Models, ops (numerical kernels), the loss from features to gradients, or all of these; or
    generate: text, one row at a time; or attention: linear and momentum attention by chunks."""
    rules: str | None = None
    """Rules separated by commas, with options in brackets as in `compare`
    (`gradient_descent[attention=momentum]`); the first is what others are relative to. Default:
    all."""
    rounds: int = 7
    """Timed rounds; every round times everything once."""
    num_layers: int = 6
    """Layers."""
    num_heads: int = 6
    """Attention heads."""
    d_model: int = 384
    """Width."""
    context_length: int = 256
    """Tokens in a sequence."""
    lengths: str | None = None
    """With --what attention: sequence lengths separated by commas (`1024,4096`). Default: the
    context length."""
    batch_size: int = 8
    """Sequences at once."""
    vocab_size: int = 256
    """Number of token ids."""
    new_tokens: int = 256
    """Tokens that generation makes."""
    threads: int | None = None
    """CPU threads; default: torch's own choice."""
    gpt2: Annotated[
        bool,
        tyro.conf.arg(
            help="Leave out transformers' GPT2LMHeadModel of that shape.",
            help_behavior_hint="(default: timed if transformers is installed)",
        ),
    ] = True
    out: Path | None = None
    """Folder for results.json."""

    def __post_init__(self) -> None:
        for name in ("rounds", "batch_size", "new_tokens"):
            check_whole(name, getattr(self, name))
        check_whole("threads", self.threads, optional=True)
        if self.lengths is not None and self.what != "attention":
            raise ConfigError("lengths is for --what attention; elsewhere it is --context-length")
        _ = self.every_length

    @property
    def every_length(self) -> tuple[int, ...]:
        """What attention is timed at, ascending."""
        if self.lengths is None:
            return (self.context_length,)
        try:
            found = sorted({int(one) for one in self.lengths.split(",")})
        except ValueError:
            found = [0]
        if found[0] < 1:
            raise ConfigError(
                f"lengths={self.lengths!r} must be whole numbers of at least 1, separated by commas"
            )
        return tuple(found)


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(BenchConfig, "bench", words, DESCRIPTION)
    from polyak.bench.attention import attentions
    from polyak.bench.generation import generation
    from polyak.bench.loss import losses
    from polyak.bench.models import Shape, default_rules, models
    from polyak.bench.ops import kernels
    from polyak.bench.tables import (
        attention_table,
        generate_table,
        loss_table,
        model_table,
        op_table,
    )
    from polyak.bench.timing import load, threads
    from polyak.cli._console import Console
    from polyak.files import make_folder, write_json
    from polyak.nn.rule_text import split_entries
    from polyak.report.pages import check_out
    from polyak.training.machine import environment
    from polyak.training.processes.allocator import keep_freed_memory
    from polyak.words import plural

    if config.out is not None:
        check_out(config.out, "bench")
    console = Console(highlight=False)
    shape = Shape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        d_model=config.d_model,
        context_length=config.context_length,
        batch_size=config.batch_size,
        vocab_size=config.vocab_size,
    )
    keep_freed_memory()
    names = tuple(split_entries(config.rules)) if config.rules else default_rules()
    for name in names:
        shape.config(name)  # wrong sizes or names end here, before anything is timed
    results: dict[str, Any] = {
        "format": formats.current("bench"),
        "kind": "bench",
        "load_before": load(),
        **environment(),
    }
    with threads(config.threads) as count:
        results["threads"] = count
        work = "forward + backward" if config.what != "generate" else "generation"
        batch = "" if config.what == "generate" else f"batch {config.batch_size}, "
        loads = ", ".join(f"{value:.2f}" for value in results["load_before"] or ()) or "unknown"
        lengths = config.every_length
        every = ", ".join(f"{tokens:,}" for tokens in lengths)
        size = f"{plural(config.num_heads, 'head')}, d={config.d_model}, T={every}"
        if config.what == "attention":
            size += f", batch {config.batch_size}"
        else:
            layers = plural(config.num_layers, "layer")
            size = f"{layers}, {size}, {batch}vocabulary {config.vocab_size}"
        console.print(
            f"{work}, float32, {plural(count, 'thread')}, {plural(config.rounds, 'round')}, "
            f"{size}; load {loads}"
        )
        if config.what in ("all", "models"):
            results["models"] = models(shape, names, config.rounds, gpt2=config.gpt2)
            console.print(model_table(results["models"], names[0]))
        if config.what in ("all", "ops"):
            tokens = config.batch_size * config.context_length
            results["ops"] = kernels(
                tokens, config.num_heads, config.d_model // config.num_heads, config.rounds
            )
            console.print(op_table(results["ops"], tokens))
        if config.what in ("all", "loss"):
            tokens = config.batch_size * config.context_length
            results["loss"] = losses(tokens, config.vocab_size, config.d_model, config.rounds)
            console.print(loss_table(results["loss"], tokens, config.vocab_size))
        if config.what == "generate":
            results["generate"] = generation(
                shape, names, config.rounds, config.new_tokens, gpt2=config.gpt2
            )
            console.print(generate_table(results["generate"], config.new_tokens))
        if config.what == "attention":
            results["attention"] = attentions(
                config.batch_size,
                lengths,
                config.num_heads,
                config.d_model // config.num_heads,
                config.rounds,
            )
            for tokens in lengths:
                console.print(attention_table(results["attention"], tokens, tokens == lengths[-1]))
    results["load_after"] = load()
    if config.out is not None:
        write_json(make_folder(config.out) / "results.json", results)
    return 0
