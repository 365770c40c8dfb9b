"""What a run will take — parameters, FLOPs, memory, hours — and whether it can work at all."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from polyak.data import hub
from polyak.data.corpora import NAMES, load_corpus
from polyak.errors import ConfigError, DataError
from polyak.nn.cost import cost
from polyak.training.config.recipes import tokenizer_size
from polyak.training.config.run import RunConfig
from polyak.training.machine import machine_memory
from polyak.training.memory import Memory, memory
from polyak.training.schedules import decay_begins

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """The processes that train together, as torchrun announces them."""

    size: int = 1
    """All of them."""
    local: int = 1
    """Those on this machine."""

    @classmethod
    def from_environment(cls) -> Processes:
        """`WORLD_SIZE` and `LOCAL_WORLD_SIZE`; one process where torchrun did not start it.

        Raises:
            ConfigError: a variable is not a number of at least 1.
        """
        if not {"RANK", "LOCAL_RANK"} & os.environ.keys():
            return cls()  # schedulers set WORLD_SIZE too
        size = _count("WORLD_SIZE", 1)
        return cls(size=size, local=_count("LOCAL_WORLD_SIZE", size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a run will take."""

    parameters: dict[str, int]
    """Parameters by group, as `polyak.nn.cost.Cost.parameters`."""
    tokens_per_step: int
    """Target tokens of one optimizer step, over all processes."""
    tokens: int
    """Target tokens of the whole run."""
    flops_per_token: int
    """Matrix products of one forward and backward pass."""
    flops: float
    """Matrix products of the run: SAM's second passes and validations are in it, the optimizers'
    own are not."""
    memory: Memory
    """Of one process."""
    hours: float | None
    """At the given tokens per second; None if none were given."""

    @property
    def total_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(self.parameters.values())


def estimate(
    config: RunConfig,
    *,
    tokens_per_second: float | None = None,
    processes: Processes | None = None,
    cuda: bool = False,
) -> Estimate:
    """What a run will take.

    Args:
        config: the run.
        tokens_per_second: of all processes together, as metrics.jsonl reports it; validation and
            saving are not in it.
        processes: that train together; one, if left out.
        cuda: on CUDA, where `precision="auto"` is bfloat16.

    Raises:
        ConfigError: `tokens_per_second` is not above 0, or the model cannot be built.
        RuleError: a user's rule fails.
    """
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise ConfigError(f"tokens_per_second={tokens_per_second!r} must be a number above 0")
    recipe, price = config.training, cost(config.model)
    per_step = recipe.batch_size * config.model.context_length
    sam = {
        "off": 0,
        "always": recipe.steps,
        "decay": recipe.steps - decay_begins(recipe),
    }[recipe.sam]
    validations = math.ceil(recipe.steps / recipe.eval_interval)
    size = 1 if processes is None else processes.size
    held = memory(
        config,
        processes=size,
        cuda=cuda,
        buckets=size > 1 and config.parallel != "fsdp",
    )
    if size > 1 and config.parallel == "fsdp":
        tables = sum(price.parameters[name] for name in ("tokens", "positions", "streams"))
        held = _sharded(held, size, tables / price.total_parameters, config)
    return Estimate(
        parameters=price.parameters,
        tokens_per_step=per_step,
        tokens=recipe.steps * per_step,
        flops_per_token=price.training_flops_per_token,
        flops=float((recipe.steps + sam) * per_step * price.training_flops_per_token)
        + float(validations * recipe.eval_tokens * price.forward_flops_per_token),
        memory=held,
        hours=None
        if tokens_per_second is None
        else recipe.steps * per_step / tokens_per_second / 3600,
    )


def _sharded(held: Memory, size: int, tables: float, config: RunConfig) -> Memory:
    """About what is held under FSDP2: weights, gradients and optimizer state in `size` parts.

    Embedding tables and two blocks are whole while they are used; gradients are, as long as
    micro-batches are added up.
    """
    blocks = (1 - tables) * held.weights / config.model.num_layers
    whole = round(tables * held.weights + 2 * blocks)
    share = config.training.batch_size // size
    adds_up = config.training.micro_batch_size not in (None, share)
    away = 1 - 1 / size
    resting = held.weights + held.optimizer + held.perturbation
    return dataclasses.replace(
        held,
        weights=held.weights // size,
        gradients=held.gradients // (1 if adds_up else size),
        optimizer=held.optimizer // size,
        perturbation=held.perturbation // size,
        temporary=held.temporary + whole,
        forward_backward=held.forward_backward - round(away * resting) + whole,
        update=held.update // size,
        validation=held.validation - round(away * (held.weights + held.optimizer)) + whole,
    )


def check_plan(config: RunConfig, processes: Processes) -> None:
    """Refuse what cannot work, as far as it shows without reading the corpus.

    Raises:
        ConfigError: the vocabulary is too small for the tokenizer, the batch is not divisible by
            processes and micro-batches, or the validation set is less than a block.
        UnknownNameError: no such tokenizer or corpus; the nearest is offered.
        DataError: the corpus is one text file that is shorter than a block.
    """
    recipe, model = config.training, config.model
    tokens = tokenizer_size(config.tokenizer)
    if model.vocab_size < tokens:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size} is smaller than the {tokens} tokens of "
            f"tokenizer {config.tokenizer!r}; set model.vocab_size to at least that"
        )
    if recipe.eval_tokens < model.context_length:
        raise ConfigError(
            f"training.eval_tokens={recipe.eval_tokens} is less than one block of "
            f"model.context_length={model.context_length}; set it to at least that"
        )
    share, rest = divmod(recipe.batch_size, processes.size)
    if rest:
        raise ConfigError(
            f"training.batch_size={recipe.batch_size} does not divide over {processes.size} "
            f"processes; choose a multiple of {processes.size}"
        )
    if recipe.micro_batch_size is not None and share % recipe.micro_batch_size:
        raise ConfigError(
            f"training.micro_batch_size={recipe.micro_batch_size} does not divide the {share} "
            f"sequences that each of {processes.size} processes has of a batch of "
            f"{recipe.batch_size}; choose a divisor of {share}"
        )
    _check_corpus(config)


def check_memory(estimated: Memory, available: int | None, where: str, copies: int = 1) -> None:
    """Refuse a run whose estimated peak is above what the device has.

    Args:
        estimated: of one process.
        available: bytes of the device; None if unknown, which refuses nothing.
        where: the device, for the message.
        copies: processes that share the device.

    Raises:
        ConfigError: naming both numbers and what to lower.
    """
    needed = estimated.peak * copies
    if available is None or needed <= available:
        return
    shared = f" in {copies} processes" if copies > 1 else ""
    raise ConfigError(
        f"training needs about {gib(needed)} of memory{shared}, and {where} has "
        f"{gib(available)}; lower {_remedy(estimated)}"
    )


def device_memory(cuda: bool) -> int | None:
    """Bytes of memory of the first CUDA device, or of the machine or its control group."""
    if cuda:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    limits = []
    for file in _CGROUP_LIMITS:
        try:
            limits.append(int(file.read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min([*limits, *filter(None, [machine_memory()])], default=None)


def gib(count: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _remedy(estimated: Memory) -> str:
    if estimated.peak == estimated.validation or estimated.peak == estimated.update:
        return "model.d_model, model.num_layers or model.vocab_size"
    return "training.micro_batch_size, or the model's size"


def _check_corpus(config: RunConfig) -> None:
    """Whether there is such a corpus and it has text to train on; no document is read."""
    name, length = config.corpus, config.model.context_length
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # "~nobody/…": no such user
        path = Path(name)
    on_hub = name not in NAMES and hub.parse(name) is not None
    if name in NAMES or (not on_hub and path.is_dir()):
        return
    if not on_hub and path.is_file():
        size = path.stat().st_size
        plain = not {".gz", ".zst", ".parquet"} & set(path.suffixes)
        if plain and size <= length:  # a token is a byte or more
            raise DataError(
                f"corpus {name!r} is too short: {size} bytes, but one block of "
                f"model.context_length={length} needs {length + 1} tokens; use more text or a "
                "smaller context"
            )
        return
    found = load_corpus(
        name, text_field=config.text_field, encoding=config.encoding
    )  # or says which names there are
    if "train" in found.empty_sides:
        raise ConfigError(
            f"corpus {name!r} is for evaluation and has no training side; train on another"
        )


def _count(variable: str, default: int) -> int:
    text = os.environ.get(variable)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{variable}={text!r} must be a whole number of at least 1")
    return int(text)
