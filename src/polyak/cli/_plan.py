"""What `polyak train --dry-run` prints: the configuration, and what the run will take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from polyak.training.config import recipes
from polyak.training.estimate import (
    Estimate,
    Processes,
    check_memory,
    check_plan,
    device_memory,
    estimate,
    gib,
)

if TYPE_CHECKING:
    from polyak.cli._console import Console
    from polyak.training.config.run import RunConfig
    from polyak.training.train_config import TrainOptions

WIDE = 66
"""Columns of a line with a number to the right."""

OVERHEAD = 1.35
"""Resident memory against the estimate, at the most that was measured (docs/recipes.md)."""


def print_plan(config: RunConfig, options: TrainOptions, console: Console) -> None:
    """Print the resolved configuration and the estimates; refuse a plan that cannot work.

    Raises:
        PolyakError: the plan cannot work.
    """
    processes = Processes.from_environment()
    if options.processes is not None:
        processes = Processes(size=options.processes, local=options.processes)
    check_plan(config, processes)
    cuda_here = torch.cuda.is_available()
    cuda = config.device == "cuda" or (config.device == "auto" and cuda_here)
    found = estimate(
        config, tokens_per_second=options.tokens_per_second, processes=processes, cuda=cuda
    )
    for line in (*configuration(config), ""):
        console.print(line, soft_wrap=True)  # TOML, as it is
    for line in costs(found, config, processes):
        narrow = console.width < WIDE  # no number is broken at the terminal's edge
        console.say(re.sub(r"(?<=\S) {2,}", ": ", line) if narrow else line)
    if cuda and not cuda_here:
        console.say("torch sees no CUDA device here: the memory is not compared with one.")
        return
    where = "the CUDA device" if cuda else "this machine"
    available = device_memory(cuda)
    check_memory(found.memory, available, where, 1 if cuda else processes.local)
    if available is not None:
        tight = found.memory.peak * (1 if cuda else processes.local) * OVERHEAD > available
        console.say(
            f"{where[0].upper()}{where[1:]} has {gib(available)}"
            + (", which may be too little with what comes on top." if tight else ".")
        )


def configuration(config: RunConfig) -> Iterator[str]:
    """The resolved configuration as lines of TOML, which can be saved as a recipe."""
    values = config.to_dict()
    tables = {name: values.pop(name) for name in recipes.SECTIONS}
    names = [name.rstrip(".") for name in recipes.OPTIONS]
    options = {name: tables["model"].pop(name.removeprefix("model.")) for name in names}
    yield from _assignments(values)
    for name, table in (*tables.items(), *options.items()):
        if table:
            yield ""
            yield f"[{name}]"
            yield from _assignments(table)


def costs(found: Estimate, config: RunConfig, processes: Processes) -> Iterator[str]:
    """Parameters by group, tokens and FLOPs, memory by part, and hours."""
    memory, recipe = found.memory, config.training
    yield _row("parameters", f"{found.total_parameters:,}")
    for name, count in found.parameters.items():
        if count:
            yield _row(f"  {name}", f"{count:,}")
    yield ""
    yield _row("tokens a step", f"{found.tokens_per_step:,}")
    yield _row("tokens in all", f"{found.tokens:,}")
    yield _row("FLOPs a token, forward and backward", f"{found.flops_per_token:,}")
    yield _row("FLOPs a step", f"{found.flops_per_token * found.tokens_per_step:.3e}")
    yield _row("FLOPs in all, with validation", f"{found.flops:.3e}")
    if recipe.sam != "off":
        yield "  SAM's second gradients are in the FLOPs in all, not in those a step."
    yield ""
    yield _row("memory of one process, estimated", gib(memory.peak))
    rows = recipe.micro_batch_size or recipe.batch_size // processes.size
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        f"state of {recipe.optimizer}": memory.optimizer,
        "SAM's copy of the weights": memory.perturbation,
        "DDP's copy of the gradients": memory.buckets,
        f"saved by a micro-batch of {rows}": memory.activations,
        "logits and temporaries": memory.temporary,
    }
    for name, size in parts.items():
        if size:
            yield _row(f"  {name}", gib(size))
    yield _row("  peak of forward and backward", gib(memory.forward_backward))
    yield _row("  peak of the update", gib(memory.update))
    yield _row("  peak of validation", gib(memory.validation))
    yield "  Python, torch, kernels' work space and fragmentation come on top."
    if processes.size > 1 and config.parallel == "fsdp":
        yield "  Sharding is counted for weights, gradients and state; blocks are whole in use."
    yield ""
    if found.hours is None:
        yield "hours: give --tokens-per-second; `polyak bench`, or a run's metrics, measure it."
    else:
        yield _row("hours at that speed, without validation", f"{found.hours:,.2f}")


def _row(name: str, value: str) -> str:
    return f"{name:<44}{value:>22}"


def _assignments(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    """A value as TOML writes it; `None`, which it lacks, as recipes do."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(part) for part in value)}]"
    return json.dumps("none" if value is None else value, ensure_ascii=False)
