"""Timing generation: a prompt and new tokens, one row, beside transformers' GPT-2 and its cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from polyak.bench.models import GPT2, Shape, gpt2_model
from polyak.bench.timing import Measurement, interleave
from polyak.errors import ConfigError
from polyak.evaluation.decoder import Decoder
from polyak.evaluation.generation import Generation
from polyak.evaluation.sampling_config import SamplingConfig
from polyak.nn.transformer import Transformer
from polyak.statistics.intervals import spread

PROMPT = 16
"""Tokens of the prompt."""
POSITIONS = (100, 900, 2_000, 10_000)
"""Where the time of one token is measured, as far as the context reaches, from the second on."""
_STEPS = 20  # tokens around a position


def generation(
    shape: Shape, names: tuple[str, ...], rounds: int, new_tokens: int, *, gpt2: bool = True
) -> list[Measurement]:
    """Greedy generation of one row by each rule's model, interleaved, after a warm-up round.

    Args:
        shape: size of the models.
        names: rules, with what brackets set.
        rounds: timed rounds.
        new_tokens: tokens made after a prompt of `PROMPT` random ones.
        gpt2: also time transformers' `GPT2LMHeadModel.generate` with its cache, if it is
            installed; ratios are to it, or else to the first rule.

    Returns:
        One row per model: new tokens a second, prompt included in the time (median, lowest,
        highest), the ratio to GPT-2's of the same round, and, for rules, the seconds of one
        token at each of `POSITIONS` (`seconds_at`), with the ratio of the last to the first in the
        same round, and of the first model's to this one's at each (`relative_speed_at`).

    Raises:
        ConfigError: the context does not hold prompt and new tokens.
    """
    if shape.context_length < PROMPT + new_tokens:
        raise ConfigError(
            f"context_length={shape.context_length} does not hold a prompt of {PROMPT} and "
            f"new_tokens={new_tokens}; make it at least {PROMPT + new_tokens}"
        )
    torch.manual_seed(0)
    prompt = torch.randint(shape.vocab_size, (1, shape.context_length))
    models = {name: Transformer(shape.config(name)).eval() for name in names}
    steps: dict[str, Callable[[], Any]] = {
        name: _ours(model, prompt[0, :PROMPT].tolist(), new_tokens)
        for name, model in models.items()
    }
    if gpt2 and (other := gpt2_model(shape)) is not None:
        steps[GPT2] = _theirs(other.eval(), prompt[:, :PROMPT], new_tokens)
    seconds = interleave(steps, rounds)
    base = seconds[GPT2 if GPT2 in seconds else names[0]]
    positions = [place for place in POSITIONS if shape.context_length >= place + _STEPS]
    positions = positions if len(positions) > 1 else []
    tokens = prompt[0].tolist()
    times: dict[str, dict[int, list[float]]] = {
        name: {at: [] for at in positions} for name in names
    }
    for _ in range(rounds):
        for at in positions:
            for name, model in models.items():
                times[name][at].append(_at(model, tokens, at))
    rows = []
    for name, found in seconds.items():
        row: Measurement = {
            "name": name,
            "tokens_per_second": spread([new_tokens / s for s in found]),
            "relative_speed": spread([b / s for b, s in zip(base, found, strict=True)]),
        }
        if positions and name in times:
            mine, first = times[name], times[names[0]]
            row["seconds_at"] = {str(at): spread(mine[at]) for at in positions}
            row["relative_speed_at"] = {
                str(at): spread([f / m for f, m in zip(first[at], mine[at], strict=True)])
                for at in positions
            }
            ends = zip(mine[positions[-1]], mine[positions[0]], strict=True)
            row["late_over_early"] = spread([late / early for late, early in ends])
        rows.append(row)
    return rows


def _ours(model: Transformer, prompt: list[int], new_tokens: int) -> Callable[[], None]:
    config = SamplingConfig(temperature=0, max_new_tokens=new_tokens)

    def step() -> None:
        for _ in Generation(model, [prompt], config):
            pass

    return step


def _theirs(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> Callable[[], None]:
    generate: Any = model.generate
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    mask = torch.ones_like(prompt)

    def step() -> None:
        generate(prompt, attention_mask=mask, use_cache=True, pad_token_id=0, **options)

    return step


@torch.inference_mode()
def _at(model: Transformer, tokens: list[int], position: int) -> float:
    """Median seconds of one token around a position."""
    decoder = Decoder(model, [tokens[: position - _STEPS // 2]])
    token = decoder.logits().argmax(-1)
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        token = decoder.logits(token).argmax(-1)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
