"""Timing: models against each other and ops against their references, interleaved.

Nothing else should run on the machine meanwhile; the load average is recorded so that a disturbed
measurement can be told.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from polyak import ops, rules
from polyak.nn.config import ModelConfig
from polyak.nn.transformer import Transformer

Measurement = dict[str, Any]
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

    def config(self, rule: str) -> ModelConfig:
        """The model of this size with a rule."""
        fields = dataclasses.asdict(self)
        del fields["batch_size"]
        return ModelConfig(rule=rule, **fields)


def models(
    shape: Shape, names: tuple[str, ...], rounds: int, *, gpt2: bool = True
) -> list[Measurement]:
    """Forward + backward of each rule's model, interleaved A B C … A B C …, after a warm-up round.

    Args:
        shape: sizes of model and batch.
        names: rules; the first is what ratios are relative to.
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


def kernels(tokens: int, num_heads: int, head_dim: int, rounds: int) -> list[Measurement]:
    """Forward + backward of every op in its fast and its reference form, interleaved, float32.

    Args:
        tokens: N, how many tokens at once.
        num_heads: H.
        head_dim: D.
        rounds: timed rounds.
    """
    rows = []
    for pair in ops.PAIRS:
        torch.manual_seed(0)
        inputs = pair.make_inputs(tokens, num_heads, head_dim, torch.float32)
        forms = {"fast": pair.fast, "reference": pair.reference}
        seconds = interleave({k: _op_step(form, inputs) for k, form in forms.items()}, rounds)
        rows.append(
            {
                "name": pair.name,
                "fast_seconds": spread(seconds["fast"]),
                "reference_seconds": spread(seconds["reference"]),
                "speed_up": statistics.median(
                    r / f for r, f in zip(seconds["reference"], seconds["fast"], strict=True)
                ),
            }
        )
    return rows


def interleave(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; one untimed round first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_bytes(step: Callable[[], Any]) -> int:
    """Largest amount of CPU memory that torch holds at once of what `step` allocates."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard error to nowhere: the profiler's C++ code announces itself there."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run with this many CPU threads (None: torch's own choice), and put the number back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def load() -> tuple[float, float, float] | None:
    """The load averages over 1, 5 and 15 minutes, where the system has them."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def default_rules() -> tuple[str, ...]:
    """All registered rules, gradient_descent first."""
    return rules.names()


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


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


def _op_step(form: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[[], None]:
    leaves = tuple(
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value
        for value in inputs
    )

    def step() -> None:
        y = form(*leaves)
        if y.requires_grad:
            y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    leaf.grad = None

    return step
