"""One model, its optimizers and its batches: what happens in one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from polyak.data.batches import TrainBatches, ValidationBatches
from polyak.data.prepare import Prepared
from polyak.errors import ConfigError, DivergedError
from polyak.nn.config import ModelConfig
from polyak.nn.probe import has_foreign_pieces, probe
from polyak.nn.transformer import Transformer
from polyak.training import schedules
from polyak.training.config.run import RunConfig
from polyak.training.config.training import TrainingConfig
from polyak.training.divergence import first_bad_parameter
from polyak.training.loss import LossModule
from polyak.training.optimizers import Optimizers, parameter_groups
from polyak.training.processes.distributed import World, clip_grad_norm, compile_blocks, wrap
from polyak.training.sam import perturbed, uses_sam

if TYPE_CHECKING:
    from numpy.typing import NDArray


def device_of(name: str) -> torch.device:
    """The device a config asks for.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError("device='cuda': torch sees no CUDA device; use device='cpu'")
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def precision(
    device: torch.device, recipe: TrainingConfig | None = None
) -> AbstractContextManager[Any]:
    """bfloat16 autocast, by default on CUDA only; else float32 as it is."""
    if in_bfloat16(device, recipe):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def in_bfloat16(device: torch.device, recipe: TrainingConfig | None = None) -> bool:
    """Whether a recipe (the default one when left out) trains in bfloat16 on a device."""
    kind = "auto" if recipe is None else recipe.precision
    return kind == "bfloat16" or (kind == "auto" and device.type == "cuda")


class Trainer:
    """One model, its optimizers and its batches; `step` does one optimizer step.

    Args:
        config: model and recipe; `config.training.seed` seeds weights, dropout and data order.
        data: the prepared corpus.
        world: the processes that train together; this one alone when left out.
        weights: what the model starts from, copied; drawn from the seed when left out.

    Raises:
        ConfigError: the tokenizer's vocabulary is not the model's.
        DataError: the corpus is shorter than one block.
        RuleError: a user's rule fails, or breaks what every rule must keep (`polyak.nn.probe`).
    """

    def __init__(
        self,
        config: RunConfig,
        data: Prepared,
        world: World | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.recipe = config, config.training
        check_vocabulary(config.model, data)
        self.world = World.start(config.device) if world is None else world
        self.device = self.world.device
        check_pieces(config.model, self.device, self.recipe)
        torch.manual_seed(self.recipe.seed)
        self.model = Transformer(config.model).to(self.device)
        if weights is not None:
            self.model.load_state_dict(weights)
        self._rows = self.world.rows(self.recipe.batch_size)
        if self.recipe.compile:
            compile_blocks(self.model)
        self._loss = wrap(
            LossModule(self.model, self.recipe.vocabulary_loss),
            config.parallel,
            self.world,
            bfloat16=in_bfloat16(self.device, self.recipe),
        )
        self.optimizers = Optimizers(self.model, self.recipe)
        self.parameters = [p for group in parameter_groups(self.model).values() for p in group]
        self.batches = TrainBatches(
            data.train, config.model.context_length, self.recipe.batch_size, self.recipe.seed
        )

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step, over all processes."""
        return self.recipe.batch_size * self.config.model.context_length

    def step(self, step: int) -> tuple[float, float]:
        """Forward, backward and update on the batch of `step` (0-based).

        Everything random in a step (dropout, and what a user's rule draws) follows from the seed,
        the step and the process, so a resumed run draws the same.

        Returns:
            Mean loss in nats/token before the update, and the gradient's global L2 norm before
            clipping (with SAM: that of its second gradient).

        Raises:
            DivergedError: the loss or the gradient norm is not finite; weights are left alone and
                gradients cleared.
        """
        self._seed(step)
        batch = to_tensor(self.batches.batch(step)[self._rows], self.device)
        loss, norm = self._gradient(batch), math.nan
        if uses_sam(step, self.recipe) and math.isfinite(loss):
            with perturbed(self.parameters, self.recipe.sam_rho):
                self._gradient(batch)
        if math.isfinite(loss):
            norm = clip_grad_norm(self.parameters, self.recipe.clip)
        if not math.isfinite(norm):
            what = "gradient norm" if math.isfinite(loss) else "loss"
            where = first_bad_parameter(self.model)
            for parameter in self.parameters:
                parameter.grad = None
            raise DivergedError(
                f"rule {self.model.placement.name} diverged: the {what} is not finite at step "
                f"{step + 1} (seed {self.recipe.seed})"
                + (f", first the {where}" if where else "")
                + "; lower training.muon_lr or training.adam_lr"
            )
        self.optimizers.step(schedules.factor(step, self.recipe))
        return loss, norm

    def _gradient(self, batch: Tensor) -> float:
        """Add the gradient of the mean loss over the global batch; returns that loss."""
        total = torch.zeros((), device=self.device)
        parts = torch.split(batch, self.recipe.micro_batch_size or len(batch))
        for place, part in enumerate(parts, 1):
            with self._loss.synchronised(place == len(parts)):
                with precision(self.device, self.recipe):
                    loss = self._loss(part) / self.tokens_per_step
                self._loss.backward(loss)
            total += loss.detach()
        return self.world.sum(float(total))

    def _seed(self, step: int) -> None:
        words = np.random.SeedSequence([self.recipe.seed, step, self.world.rank])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def validation_loss(self, batches: ValidationBatches) -> float:
        """Mean loss over the fixed validation set, nats/token; dropout off."""
        return validation_loss(
            self.model, batches, self.device, self._loss, world=self.world, recipe=self.recipe
        )


@torch.no_grad()
def validation_loss(
    model: Transformer,
    batches: ValidationBatches,
    device: torch.device,
    loss: Callable[[Tensor], Tensor] | None = None,
    *,
    world: World | None = None,
    recipe: TrainingConfig | None = None,
) -> float:
    """Mean loss over a validation set, nats/token; dropout off.

    Processes take rows of every batch in turn; one that has none left repeats a row for nothing,
    since with sharded weights all must call the model together.

    Args:
        model: the model, put back into the mode it was in.
        batches: the set.
        device: where the model is.
        loss: summed loss of a batch (b, T+1); the model's own when left out.
        world: the processes that share the work; this one alone when left out.
        recipe: says the precision; the default one when left out.
    """
    loss = LossModule(model) if loss is None else loss
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    training = model.training
    model.eval()
    total = 0.0
    for batch in batches:
        rows = batch[rank::size]
        with precision(device, recipe):
            part = loss(to_tensor(rows if len(rows) else batch[:1], device))
        total += float(part) if len(rows) else 0.0
    model.train(training)
    return (total if world is None else world.sum(total)) / batches.tokens


def to_tensor(batch: NDArray[Any], device: torch.device) -> Tensor:
    """A numpy batch of ids as int64 on the device."""
    return torch.from_numpy(batch).to(device)


def check_pieces(model: ModelConfig, device: torch.device, recipe: TrainingConfig) -> None:
    """Probe a model's pieces before the first step, if they are a user's own.

    Raises:
        RuleError: they break what every piece must keep; see `polyak.nn.probe`.
    """
    if has_foreign_pieces(model):
        probe(model, torch.bfloat16 if in_bfloat16(device, recipe) else torch.float32)


def check_vocabulary(model: ModelConfig, data: Prepared) -> None:
    """Raise ConfigError when the model has fewer ids than the tokenizer."""
    if model.vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size={model.vocab_size} is smaller than the {data.tokenizer.vocab_size} tokens "
            f"of tokenizer {data.tokenizer.name!r}; set model.vocab_size to at least that"
        )


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
