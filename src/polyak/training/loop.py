"""The training loop: batches in, a run folder out."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.data.batches import TrainBatches, ValidationBatches
from polyak.data.prepare import Prepared, prepare
from polyak.errors import ConfigError, DivergedError
from polyak.files import write_json
from polyak.nn.config import ModelConfig
from polyak.nn.cost import cost
from polyak.nn.transformer import Transformer
from polyak.rules._registry import source_of
from polyak.training.metrics import MetricsLog
from polyak.training.optimizers import Optimizers, cosine_with_warmup, parameter_groups
from polyak.training.rule_check import check_rule
from polyak.training.run_config import RunConfig
from polyak.training.runs import RunFolder, peak_memory_bytes, save_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[dict[str, Any]], None]
LOG_EVERY = 10


def device_of(name: str) -> torch.device:
    """The device a config asks for.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError("device='cuda': torch sees no CUDA device; use device='cpu'")
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 autocast on CUDA; float32 as it is on CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


class Trainer:
    """One model, its optimizers and its batches; `step` does one optimizer step.

    Args:
        config: model and recipe; `config.training.seed` seeds weights, dropout and data order.
        data: the prepared corpus.

    Raises:
        ConfigError: the tokenizer's vocabulary is not the model's.
        DataError: the corpus is shorter than one block.
        RuleError: a user's rule fails, or returns something else than (x, state).
    """

    def __init__(self, config: RunConfig, data: Prepared) -> None:
        self.config, self.recipe = config, config.training
        check_vocabulary(config.model, data)
        self.device = device_of(config.device)
        torch.manual_seed(self.recipe.seed)
        self.model = Transformer(config.model).to(self.device)
        check_rule(self.model)
        self.optimizers = Optimizers(self.model, self.recipe)
        self.parameters = [p for group in parameter_groups(self.model).values() for p in group]
        self.batches = TrainBatches(
            data.train, config.model.context_length, self.recipe.batch_size, self.recipe.seed
        )

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step."""
        return self.recipe.batch_size * self.config.model.context_length

    def step(self, step: int) -> tuple[float, float]:
        """Forward, backward and update on the batch of `step` (0-based).

        Returns:
            Mean loss in nats/token before the update, and the gradient's global L2 norm before
            clipping.

        Raises:
            DivergedError: the loss or the gradient norm is not finite; weights are left alone.
        """
        micro = self.recipe.micro_batch_size or self.recipe.batch_size
        total = 0.0
        for part in torch.split(to_tensor(self.batches.batch(step), self.device), micro):
            with precision(self.device):
                loss = token_loss(self.model, part) / self.tokens_per_step
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(total) else "gradient norm"
            raise DivergedError(
                f"rule {self.model.rule.name} diverged: the {what} is not finite at step "
                f"{step + 1} (seed {self.recipe.seed}); lower training.muon_lr or training.adam_lr"
            )
        self.optimizers.step(cosine_with_warmup(step, self.recipe))
        return total, norm


def token_loss(model: Transformer, batch: Tensor) -> Tensor:
    """Summed cross-entropy in nats of a batch (b, T+1): inputs [:, :-1], targets [:, 1:]."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")


def to_tensor(batch: NDArray[Any], device: torch.device) -> Tensor:
    """A numpy batch of ids as int64 on the device."""
    return torch.from_numpy(batch).to(device)


def check_vocabulary(model: ModelConfig, data: Prepared) -> None:
    """Raise ConfigError when the model has fewer ids than the tokenizer."""
    if model.vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size={model.vocab_size} is smaller than the {data.tokenizer.vocab_size} tokens "
            f"of tokenizer {data.tokenizer.name!r}; set model.vocab_size to at least that"
        )


@torch.no_grad()
def validation_loss(model: Transformer, batches: ValidationBatches, device: torch.device) -> float:
    """Mean loss over the fixed validation set, nats/token; dropout off."""
    training = model.training
    model.eval()
    total = 0.0
    for batch in batches:
        with precision(device):
            total += float(token_loss(model, to_tensor(batch, device)))
    model.train(training)
    return total / batches.tokens


def validation_set(config: RunConfig, data: Prepared) -> ValidationBatches:
    """The one fixed set that everything compared is measured on.

    Raises:
        ConfigError: `eval_tokens` is less than one block.
        DataError: the validation side of the corpus is shorter than one block.
    """
    length, tokens = config.model.context_length, config.training.eval_tokens
    if tokens < length:
        raise ConfigError(
            f"eval_tokens={tokens} is less than one block of context_length={length}; "
            f"set training.eval_tokens to at least {length}"
        )
    return ValidationBatches(data.validation, length, 32, tokens)


def run_settings(
    config: RunConfig, data: Prepared, validation: ValidationBatches
) -> dict[str, Any]:
    """What makes a run the run it is: two runs with equal settings are the same experiment."""
    source = source_of(config.model.rule)
    device = device_of(config.device)
    return {
        "model": config.model.to_dict(),
        "training": config.training.to_dict(),
        "corpus": {"name": data.manifest["corpus"]["name"], "fingerprint": data.fingerprint},
        "tokenizer": {"name": data.tokenizer.name, "fingerprint": data.tokenizer.fingerprint},
        "validation": {"fingerprint": validation.fingerprint, "tokens": validation.tokens},
        "device": device.type,
        "rule_source": hashlib.sha256(source.read_bytes()).hexdigest() if source else None,
    }


def train(config: RunConfig, folder: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train one model from scratch into a run folder; a finished run is returned as it is.

    Args:
        config: everything that defines the run.
        folder: the run's folder; see `polyak.training.runs`.
        progress: called with {"step", "steps", "loss"} after every step.

    Returns:
        The content of `result.json`: final validation loss, seconds, tokens per second, memory.

    Raises:
        RunError: the folder cannot be written or holds a run with other settings.
        DivergedError: the loss stopped being finite.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = prepare(config.corpus, config.tokenizer, text_field=config.text_field)
    validation = validation_set(config, data)
    run = RunFolder(folder)
    settings = run_settings(config, data, validation)
    run.check(settings)
    finished = run.result()
    if finished is not None:
        return finished
    trainer = Trainer(config, data)
    run.begin(settings)
    with MetricsLog(run.metrics_file) as log:
        loss, seconds = _run_steps(trainer, validation, log, progress)
    save_model(trainer.model, data.tokenizer, folder / "model")
    tokens = config.training.steps * trainer.tokens_per_step
    result = {
        "steps": config.training.steps,
        "tokens": tokens,
        "loss": loss,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "threads": torch.get_num_threads(),
    }
    write_json(run.result_file, result)
    return result


def _run_steps(
    trainer: Trainer, validation: ValidationBatches, log: MetricsLog, progress: Progress | None
) -> tuple[float, float]:
    """All steps with their log; returns the last validation loss and the training seconds."""
    recipe, model = trainer.recipe, trainer.model
    flops_per_step = cost(model.config).training_flops_per_token * trainer.tokens_per_step
    model.train()
    seconds, loss = 0.0, math.nan  # validation and logging are not counted
    window_tokens, window_seconds, window_loss = 0, 0.0, 0.0
    for step in range(recipe.steps):
        began = time.perf_counter()
        train_loss, norm = trainer.step(step)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
        seconds += elapsed
        window_tokens, window_seconds = (
            window_tokens + trainer.tokens_per_step,
            window_seconds + elapsed,
        )
        window_loss += train_loss * trainer.tokens_per_step
        done = step + 1
        at = {
            "step": done,
            "tokens": done * trainer.tokens_per_step,
            "flops": done * flops_per_step,
            "seconds": round(seconds, 4),
        }
        if done % LOG_EVERY == 0 or done == recipe.steps:
            factor = cosine_with_warmup(step, recipe)
            log.write(
                "train",
                **at,
                loss=window_loss / window_tokens,
                gradient_norm=norm,
                tokens_per_second=window_tokens / window_seconds,
                rates={
                    "muon": factor * recipe.muon_lr,
                    "adam": factor * recipe.adam_lr,
                    "scalar": factor * recipe.scalar_lr,
                },
                scalars=model.scalars(),
            )
            window_tokens, window_seconds, window_loss = 0, 0.0, 0.0
        if done % recipe.eval_interval == 0 or done == recipe.steps:
            loss = validation_loss(model, validation, trainer.device)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"rule {model.rule.name} diverged: the validation loss is not finite after "
                    f"step {done} (seed {recipe.seed}); lower training.muon_lr or training.adam_lr"
                )
            log.write("validation", **at, loss=loss, scalars=model.scalars())
        if progress is not None:
            progress({"step": done, "steps": recipe.steps, "loss": train_loss})
    return loss, seconds
