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
EARLY, LATE = 100, 900
"""Positions at which the time of one token is measured, where the context reaches so far."""
_STEPS = 20  # tokens around a position


def generation(
    shape: Shape, names: tuple[str, ...], rounds: int, new_tokens: int, *, gpt2: bool = True
) -> list[Measurement]:
    """Greedy generation of one row by each rule's model, interleaved, after a warm-up round.

    Args:
        shape: size of the models.
        names: rules.
        rounds: timed rounds.
        new_tokens: tokens made after a prompt of `PROMPT` random ones.
        gpt2: also time transformers' `GPT2LMHeadModel.generate` with its cache, if it is
            installed; ratios are to it, or else to the first rule.

    Returns:
        One row per model: new tokens a second, prompt included in the time (median, lowest,
        highest), the ratio to GPT-2's of the same round, and, for rules, the seconds of one
        token at positions `EARLY` and `LATE` and the ratio of the two in the same round.

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
    positions = shape.context_length >= LATE + _STEPS
    tokens = prompt[0].tolist()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds if positions else 0):
        for name, model in models.items():
            times[name].append((_at(model, tokens, EARLY), _at(model, tokens, LATE)))
    rows = []
    for name, found in seconds.items():
        row: Measurement = {
            "name": name,
            "tokens_per_second": spread([new_tokens / s for s in found]),
            "relative_speed": spread([b / s for b, s in zip(base, found, strict=True)]),
        }
        if times.get(name):
            row["seconds_early"] = spread([early for early, _ in times[name]])
            row["seconds_late"] = spread([late for _, late in times[name]])
            row["late_over_early"] = spread([late / early for early, late in times[name]])
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
