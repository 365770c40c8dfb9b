"""Timing: models against each other and ops against their references, interleaved.

Nothing else should run on the machine meanwhile; the load average is recorded so that a disturbed
measurement can be told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak import rules
from polyak.bench.timing import Measurement, interleave, peak_bytes
from polyak.compare.entries import parse_entry
from polyak.nn.config import ModelConfig
from polyak.nn.transformer import Transformer
from polyak.statistics.intervals import spread

GPT2 = "GPT2LMHeadModel"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size that models are timed at."""

    num_layers: int
    num_heads: int
    d_model: int
    context_length: int
    batch_size: int
    vocab_size: int

    def config(self, entry: str) -> ModelConfig:
        """The model of this size that an entry of a comparison describes: `RULE[KEY=VALUE]`."""
        fields = dataclasses.asdict(self)
        del fields["batch_size"]
        return parse_entry(entry, ModelConfig(**fields)).model


def models(
    shape: Shape, names: tuple[str, ...], rounds: int, *, gpt2: bool = True
) -> list[Measurement]:
    """Forward + backward of each rule's model, interleaved A B C … A B C …, after a warm-up round.

    Args:
        shape: sizes of model and batch.
        names: rules, with what brackets set; the first is what ratios are relative to.
        rounds: timed rounds.
        gpt2: also time transformers' `GPT2LMHeadModel` of that shape (dropout 0, SDPA), if it is
            installed.

    Returns:
        One row per model: tokens/s (median, lowest, highest), the ratio to the first model of the
        same round (median, lowest, highest), and the peak of what torch allocates during one
        forward + backward, with its ratio.
    """
    steps: dict[str, Callable[[], Any]] = {}
    torch.manual_seed(0)
    ids = torch.randint(shape.vocab_size, (shape.batch_size, shape.context_length + 1))
    for name in names:
        steps[name] = _step(Transformer(shape.config(name)), ids)
    if gpt2 and (other := gpt2_model(shape)) is not None:
        steps[GPT2] = _step(other, ids)
    seconds = interleave(steps, rounds)
    tokens = shape.batch_size * shape.context_length
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    first = names[0]
    return [
        {
            "name": name,
            "tokens_per_second": spread([tokens / s for s in found]),
            "relative_speed": spread(
                [base / s for base, s in zip(seconds[first], found, strict=True)]
            ),
            "peak_bytes": peaks[name],
            "relative_peak": peaks[name] / peaks[first],
        }
        for name, found in seconds.items()
    ]


def default_rules() -> tuple[str, ...]:
    """All registered rules, gradient_descent first."""
    return rules.names()


def _step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()

    def step() -> None:
        output = model(inputs)
        logits = getattr(output, "logits", output)
        F.cross_entropy(logits.flatten(0, 1), targets).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    return step


def gpt2_model(shape: Shape) -> nn.Module | None:
    """transformers' GPT-2 of that shape, to train; None where transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.d_model,
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    model: nn.Module = GPT2LMHeadModel(config).train()
    return model
