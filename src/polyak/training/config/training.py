"""`TrainingConfig`: how a model is trained. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from polyak.checks import check_number, check_whole, is_number
from polyak.errors import ConfigError, unknown
from polyak.settings import check_keys, typed

Optimizer = Literal["muon", "adamw"]
Schedule = Literal["cosine", "wsd", "constant"]
Sharpness = Literal["off", "always", "decay"]
VocabularyLoss = Literal["auto", "plain", "chunked"]
Precision = Literal["auto", "float32", "bfloat16"]
_CHOICES = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "sam": Sharpness,
    "vocabulary_loss": VocabularyLoss,
    "precision": Precision,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Recipe of one run: the released groups, with rates scaled for small models.

    The defaults are Muon for the matrices inside blocks and AdamW for everything else, as in
    arXiv:2605.24425. Rates rise linearly from 0 over the warm-up, then follow the schedule.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    steps: int = 1200
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences per step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None: the whole batch. The gradient is the same mean."""
    optimizer: Optimizer = "muon"
    """`muon`: Muon for the matrices inside blocks, AdamW for the rest. `adamw`: AdamW for all, with
    decay on matrices and embeddings and none on norms and scalars."""
    schedule: Schedule = "cosine"
    """After the warm-up: `cosine` to `final_rate`; `wsd`: the peak, then from `decay_start` on a
    line to `final_rate`; `constant`: the peak."""
    warmup: float = 0.1
    """Fraction of the steps over which rates rise from 0."""
    decay_start: float = 0.8
    """Fraction of the steps at which the decay of `wsd` begins."""
    final_rate: float = 0.1
    """`cosine` and `wsd` end at this fraction of their peak."""
    muon_lr: float = 0.02
    """Peak rate of Muon, for the 2-D weights inside blocks."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon."""
    adam_lr: float = 3e-3
    """Peak rate of AdamW for embeddings, output and norms."""
    scalar_lr: float = 1e-2
    """Peak rate of AdamW for the rules' scalars."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay of embeddings and output; norms and scalars have none."""
    clip: float = 1.0
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""
    sam: Sharpness = "off"
    """Sharpness-aware minimisation (arXiv:2010.01412): the gradient is taken at the weights plus
    sam_rho·g/‖g‖, on the same micro-batches. `always`, or `decay`: in the decay of `wsd` only."""
    sam_rho: float = 0.05
    """Length of SAM's step, one L2 norm over all parameters."""
    vocabulary_loss: VocabularyLoss = "auto"
    """`plain` makes all logits at once, `chunked` never; `auto` chooses by their size."""
    precision: Precision = "auto"
    """`bfloat16` autocast, or `float32`; `auto`: bfloat16 on CUDA, float32 on CPU."""
    compile: bool = False
    """Compile each block with torch.compile."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: by time, see `checkpoint_minutes`."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints when `checkpoint_every` is None."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; at least 2."""
    skip_nonfinite: int = 0
    """Steps with a non-finite loss or gradient that may be skipped; one more stops the run."""
    eval_every: int | None = None
    """Steps between validations; None: a fifteenth of the steps."""
    eval_tokens: int = 32_768
    """Size of the one fixed validation set, in tokens."""
    seed: int = 0
    """Seeds the initial weights, dropout and the order of the data."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))
        for name in ("steps", "batch_size", "eval_tokens"):
            check_whole(name, getattr(self, name))
        check_whole("keep_checkpoints", self.keep_checkpoints, 2)
        for name in ("seed", "skip_nonfinite"):
            check_whole(name, getattr(self, name), 0)
        for name, most in (("steps", 10**12), ("seed", 2**63 - 1)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name}={getattr(self, name)} must be at most {most}")
        for name in ("micro_batch_size", "eval_every", "checkpoint_every"):
            check_whole(name, getattr(self, name), optional=True)
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"batch_size={self.batch_size}; choose a divisor"
            )
        for name in ("muon_lr", "adam_lr", "scalar_lr", "weight_decay", "sam_rho"):
            check_number(name, getattr(self, name))
        for name in ("warmup", "decay_start", "final_rate"):
            check_number(name, getattr(self, name), 0, 1)
        if self.schedule == "wsd" and self.decay_start < self.warmup:
            raise ConfigError(
                f"decay_start={self.decay_start!r} is before the end of the warm-up "
                f"(warmup={self.warmup!r}); choose a later one"
            )
        if self.sam == "decay" and self.schedule != "wsd":
            raise ConfigError(
                f"sam='decay' needs a decay phase, but schedule={self.schedule!r}; "
                "set schedule to 'wsd', or sam to 'always'"
            )
        if not isinstance(self.compile, bool):
            raise ConfigError(f"compile={self.compile!r} must be true or false")
        if not (is_number(self.muon_momentum) and 0 <= self.muon_momentum < 1):
            raise ConfigError(f"muon_momentum={self.muon_momentum!r} must be from 0 to below 1")
        object.__setattr__(self, "adam_betas", tuple(self.adam_betas))
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas={self.adam_betas!r} must be two numbers in [0, 1)")
        for name in ("clip", "checkpoint_minutes"):
            check_number(name, getattr(self, name), above=True)

    @property
    def eval_interval(self) -> int:
        """Steps between validations."""
        return self.eval_every or max(1, self.steps // 15)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "adam_betas": list(self.adam_betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Back from `to_dict`.

        Raises:
            UnknownNameError: a key is not a field; the nearest is offered.
        """
        check_keys(cls, values, "training setting")
        return cls(**typed(cls, values))
