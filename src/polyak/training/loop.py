"""The training loop: batches in, a run folder out; stopped at any moment, it goes on from there."""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from polyak.data.batches import ValidationBatches
from polyak.data.prepare import Prepared, prepare
from polyak.errors import DivergedError, RunError, StoppedError, UnwritableError
from polyak.files import locked, make_folder, write_json
from polyak.nn.cost import cost
from polyak.nn.pieces import keep, other_sources, portable_values, source_hash
from polyak.reading import Check, fields, list_of, number, one_of, optional, whole
from polyak.signals import StopSignals
from polyak.training.config.run import RunConfig
from polyak.training.divergence import SpikeDetector
from polyak.training.initial import identity, initial_weights
from polyak.training.machine import peak_memory_bytes
from polyak.training.processes.distributed import World
from polyak.training.runs.checkpoints import Checkpoint, Checkpoints, due
from polyak.training.runs.folder import RunFolder, save_model
from polyak.training.runs.journal import Journal
from polyak.training.runs.metrics import keep_until
from polyak.training.runs.trackers import check_trackers, open_trackers
from polyak.training.sam import uses_sam
from polyak.training.throughput import matmul_peak, memory_bytes
from polyak.training.trainer import Trainer, device_of, in_bfloat16, validation_set

Progress = Callable[[dict[str, Any]], None]
LOG_EVERY = 10
CHANGEABLE = (
    "training.steps",
    "training.eval_every",
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "training.keep_checkpoints",
    "training.skip_nonfinite",
)
"""What a resumed run may change; each change is recorded in `run.json` and `metrics.jsonl`."""


@dataclass
class Counters:
    """Where a run is: all of the loop's memory, saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    skipped: int = 0
    updated: bool = False
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_flops: float = 0.0
    window_losses: int = 0
    window_loss: float = 0.0
    norm: float | None = None
    validation: float | None = None
    validated: int = 0
    recent: list[float] = field(default_factory=list)


def run_settings(
    config: RunConfig, data: Prepared, validation: ValidationBatches
) -> dict[str, Any]:
    """What makes a run the run it is: two runs with equal settings are the same experiment."""
    device = device_of(config.device)
    return {
        "model": portable_values(config.model),
        "training": config.training.to_dict(),
        "corpus": {
            "name": data.manifest["corpus"]["name"],
            "fingerprint": data.fingerprint,
            **(
                {"split": version}
                if (version := data.manifest["split"].get("version", 1)) > 1
                else {}
            ),
        },
        "tokenizer": {"name": data.tokenizer.name, "fingerprint": data.tokenizer.fingerprint},
        "validation": {
            "fingerprint": validation.fingerprint,
            "tokens": validation.tokens,
            "bytes": validation.bytes,
        },
        "init": identity(config.init),
        "device": device.type,
        "rule_source": source_hash(config.model.rule),
        **other_sources(config.model),
    }


def train(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool | None = None,
    progress: Progress | None = None,
    signals: bool | StopSignals = False,
    last_checkpoint: bool = False,
) -> dict[str, Any]:
    """Train one model into a run folder, from the start or from its newest whole checkpoint.

    Resumed on the same machine with the same number of threads and processes, a run on the CPU
    gives the losses, weights and optimizer state of one that was never stopped, bit for bit.

    Args:
        config: everything that defines the run.
        folder: the run's folder; see `polyak.training.runs.folder`.
        resume: True: the folder must hold a run, which goes on; its end may move
            (`training.steps`). False: the folder must hold none. None: go on if there is a run
            with equal settings, else begin.
        progress: called with {"step", "steps", "loss"} after every step.
        signals: stop at SIGTERM, SIGINT, SIGHUP and SIGUSR1, between two steps and with a
            checkpoint; or when these, opened by the caller, are asked to.
        last_checkpoint: also save one after the last step, so that the run can be prolonged.

    Returns:
        The content of `result.json`: final validation loss, seconds, tokens per second, memory.

    Raises:
        RunError: the folder cannot be written, is in use, or holds a run with other settings; or
            a checkpoint could not be saved. The last good checkpoint is named.
        DivergedError: the loss or gradient stopped being finite; also names the step, the first
            bad parameter and the last good checkpoint.
        StoppedError: a signal asked for a stop; the checkpoint is named.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        world = stack.enter_context(World.start(config.device))
        run = RunFolder(folder)
        check_trackers(config.trackers)
        if resume and not run.settings_file.exists():
            raise RunError(f"{folder} is not a run: run.json is missing; leave out --resume")
        if resume is False and run.settings_file.exists():
            raise RunError(f"{folder} holds a run already; add --resume, or choose another --out")
        stack.enter_context(_naming_the_last_checkpoint(run))
        if world.main:
            make_folder(folder)
            stack.enter_context(locked(folder, "polyak run"))
        world.barrier()
        with world.main_first():  # prepares the corpus; the others find it made
            data = prepare(config.corpus, config.tokenizer, **config.reading)
        validation = validation_set(config, data)
        settings = run_settings(config, data, validation)
        changes = run.check(settings, CHANGEABLE if resume else ())
        finished = run.result()
        if finished is not None and finished["steps"] == config.training.steps:
            if changes:
                raise RunError(
                    f"{folder} is finished, so {next(iter(changes))} changes nothing; only a "
                    "larger training.steps goes on with it"
                )
            return finished
        identity = run.identity() if run.settings_file.exists() else secrets.token_hex(16)
        with world.main_first():  # from here on, the copy of a user's code is what runs
            model = keep(folder, config.model, run=identity)
        config = dataclasses.replace(config, model=model)
        settings = run_settings(config, data, validation)
        session = _Session(config, run, data, validation, world, progress)
        session.open(settings, changes, identity)
        if isinstance(signals, StopSignals):
            session.stop = signals
        elif signals:
            session.stop = stack.enter_context(StopSignals())
        return session.run(last_checkpoint)


@contextmanager
def _naming_the_last_checkpoint(run: RunFolder) -> Iterator[None]:
    """Where the folder cannot be written, say where to go on from once it can."""
    try:
        yield
    except UnwritableError as error:
        last = Checkpoints(run.checkpoints_folder, world=World()).last_path()
        if last is None or "last good checkpoint" in str(error):
            raise
        raise UnwritableError(f"{error}; last good checkpoint: {last}") from error


class _Session:
    """One process's stretch of a run, from its start or a checkpoint to its end or a stop."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        data: Prepared,
        validation: ValidationBatches,
        world: World,
        progress: Progress | None,
    ) -> None:
        self.config, self.recipe, self.world = config, config.training, world
        self.run_folder, self.data, self.validation = run, data, validation
        self.progress = progress
        self.stop: StopSignals | None = None
        weights = initial_weights(config.init, config.model, data.tokenizer)
        self.trainer = Trainer(config, data, world, weights)
        self.checkpoints = Checkpoints(
            run.checkpoints_folder, keep=self.recipe.keep_checkpoints, world=world
        )
        self.at = Counters()
        self.spikes = SpikeDetector()
        bfloat16 = in_bfloat16(self.trainer.device, self.recipe)
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.peak = matmul_peak(self.trainer.device, dtype) * world.size
        flops = cost(config.model).training_flops_per_token
        self.flops_per_gradient = flops * self.trainer.tokens_per_step

    def open(self, settings: dict[str, Any], changes: dict[str, Any], identity: str | None) -> None:
        """Take up the run in the folder, or begin it."""
        world, run = self.world, self.run_folder
        self.checkpoints.run = identity
        found = self.checkpoints.newest() if run.settings_file.exists() else None
        if found is None:
            last = self.checkpoints.last_path()
            if last is not None:
                raise RunError(
                    f"no checkpoint of {run.path} is whole, the newest is {last}; start again in "
                    "another --out"
                )
            world.barrier()
            if world.main:
                self.checkpoints.run = identity or secrets.token_hex(16)
                run.begin(settings, self.config, self.data.left_out, identity=self.checkpoints.run)
        else:
            world.barrier()
            self._restore(found)
            if world.main:
                if not run.metrics_file.exists():
                    warnings.warn(
                        f"{run.metrics_file} is missing; the log begins at step {self.at.step + 1}",
                        stacklevel=2,
                    )
                keep_until(run.metrics_file, self.at.step)
                run.go_on(settings, self.config, changes, self.at.step)
        world.barrier()
        self.resumed = found
        self.changes = changes

    def run(self, last_checkpoint: bool) -> dict[str, Any]:
        """All remaining steps, then the model and the result."""
        with self._journal() as log:
            if self.resumed is not None:
                log.write(
                    "resume",
                    step=self.at.step,
                    checkpoint=self.resumed.path.name,
                    changes=self.changes,
                    processes=self.world.size,
                )
            self._steps(log, last_checkpoint)
        tokens = self.recipe.steps * self.trainer.tokens_per_step
        result = {
            "steps": self.recipe.steps,
            "tokens": tokens,
            "loss": self.at.validation,
            "seconds": self.at.seconds,
            "tokens_per_second": tokens / self.at.seconds if self.at.seconds else None,
            "peak_memory_bytes": peak_memory_bytes(),
            "threads": torch.get_num_threads(),
            "skipped": self.at.skipped,
        }
        save_model(
            self.trainer.model, self.data.tokenizer, self.run_folder.path / "model", self.world
        )
        if self.world.main:
            write_json(self.run_folder.result_file, result)
        self.world.barrier()
        return result

    def _journal(self) -> Journal:
        if not self.world.main:
            return Journal(None)
        run = self.run_folder
        settings = {**self.config.to_dict(), "flops_per_gradient": self.flops_per_gradient}
        name = f"{self.config.model.rule}-seed{self.recipe.seed}"
        tracker = open_trackers(self.config.trackers, run.path, name, settings)
        return Journal(run.metrics_file, tracker)

    def _steps(self, log: Journal, last_checkpoint: bool) -> None:
        at, recipe, trainer = self.at, self.recipe, self.trainer
        save_now = due(recipe.checkpoint_every, recipe.checkpoint_minutes)
        saved_at = time.monotonic()
        trainer.model.train()
        while at.step < recipe.steps:
            self._one(log)
            done = at.step == recipe.steps
            if at.step % recipe.eval_interval == 0 or done:
                self._validate(log)
            stopped = self.stop.requested if self.stop is not None else None
            wanted = stopped is not None or save_now(at.step, time.monotonic() - saved_at)
            # one question to all processes: clocks and signals differ between them
            if self.world.any(wanted if not done else last_checkpoint):
                path = self._save(log)
                saved_at = time.monotonic()
                if not done and self.world.any(stopped is not None):
                    raise StoppedError(
                        f"stopped by {stopped or 'a signal to another process'} after step "
                        f"{at.step} of {recipe.steps}; go on with --resume from {path}"
                    )
        if at.validated != at.step:  # the end was moved to a step that was saved already
            self._log_window(log)
            self._validate(log)

    def _one(self, log: Journal) -> None:
        """One optimizer step with its share of the log."""
        at, trainer = self.at, self.trainer
        began = time.perf_counter()
        try:
            loss, norm = trainer.step(at.step)
        except DivergedError as error:
            self._count(began)
            self._skip(log, error)
            return
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        self._count(began)
        at.updated = True
        at.window_loss += loss
        at.window_losses += 1
        at.norm = norm
        usual = self.spikes.see(loss)
        if usual is not None:
            log.write("spike", **self._place(), loss=loss, usual=usual, gradient_norm=norm)
        if at.step % LOG_EVERY == 0 or at.step == self.recipe.steps:
            self._log_window(log)
        self._tell(loss)

    def _count(self, began: float) -> None:
        """A step was taken, or at least tried: validation, logging and saving are not counted."""
        at = self.at
        elapsed = time.perf_counter() - began
        flops = self.flops_per_gradient * (2 if uses_sam(at.step, self.recipe) else 1)
        at.step += 1
        at.seconds += elapsed
        at.flops += flops
        at.window_seconds += elapsed
        at.window_flops += flops
        at.window_tokens += self.trainer.tokens_per_step

    def _skip(self, log: Journal, error: DivergedError) -> None:
        """Leave out a step that was not finite, as often as the recipe allows."""
        at, allowed = self.at, self.recipe.skip_nonfinite
        if at.skipped >= allowed:
            often = f"; {at.skipped} steps were skipped before" if allowed else ""
            raise DivergedError(
                f"{error}{often}; last good checkpoint: {self.checkpoints.last_path() or 'none'}"
            ) from error
        at.skipped += 1
        log.write("skipped", **self._place(), skipped=at.skipped, allowed=allowed, why=str(error))
        if at.step % LOG_EVERY == 0 or at.step == self.recipe.steps:
            self._log_window(log)
        self._tell(None)

    def _tell(self, loss: float | None) -> None:
        if self.progress is not None and self.world.main:
            self.progress({"step": self.at.step, "steps": self.recipe.steps, "loss": loss})

    def _log_window(self, log: Journal) -> None:
        at = self.at
        if not at.window_losses:
            return  # every step of the window was skipped
        flops = at.window_flops / at.window_seconds
        log.write(
            "train",
            **self._place(),
            loss=at.window_loss / at.window_losses,
            gradient_norm=at.norm,
            tokens_per_second=at.window_tokens / at.window_seconds,
            flops_per_second=flops,
            peak_fraction=flops / self.peak,
            memory_bytes=memory_bytes(self.trainer.device),
            peak_memory_bytes=peak_memory_bytes(),
            rates=self.trainer.optimizers.rates(),
            scalars=self.trainer.model.scalars(),
        )
        at.window_tokens, at.window_seconds, at.window_flops = 0, 0.0, 0.0
        at.window_losses, at.window_loss = 0, 0.0

    def _validate(self, log: Journal) -> None:
        at = self.at
        loss = self.trainer.validation_loss(self.validation)
        if not math.isfinite(loss):
            raise DivergedError(
                f"rule {self.trainer.model.placement.name} diverged: the validation loss is not "
                f"finite after step {at.step} (seed {self.recipe.seed}); lower training.muon_lr or "
                f"training.adam_lr; last good checkpoint: {self.checkpoints.last_path() or 'none'}"
            )
        at.validation, at.validated = loss, at.step
        log.write("validation", **self._place(), loss=loss, scalars=self.trainer.model.scalars())

    def _place(self) -> dict[str, Any]:
        at = self.at
        return {
            "step": at.step,
            "tokens": at.step * self.trainer.tokens_per_step,
            "flops": at.flops,
            "seconds": round(at.seconds, 4),
        }

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        model = self.trainer.model
        return {
            "model": {name: p.detach() for name, p in model.named_parameters()},
            "optimizer": self.trainer.optimizers.named_state(model),
        }

    def _save(self, log: Journal) -> Path:
        began = time.perf_counter()
        self.at.recent = list(self.spikes.recent)
        log.sync()  # rows of the steps before a checkpoint are as safe as the checkpoint
        path = self.checkpoints.save(self.at.step, self._tensors(), asdict(self.at))
        took = round(time.perf_counter() - began, 4)
        log.write("checkpoint", **self._place(), checkpoint=path.name, took=took)
        return path

    def _restore(self, found: Checkpoint) -> None:
        model = self.trainer.model
        self.at = _counters(found)
        if self.at.step > self.recipe.steps:
            raise RunError(
                f"training.steps={self.recipe.steps} is before the checkpoint at step "
                f"{self.at.step}; choose at least that"
            )
        parameters = dict(model.named_parameters())
        weights = found.load("model", parameters, self.world)
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        optimizers = self.trainer.optimizers
        like = optimizers.named_state(model, template=True) if self.at.updated else {}
        optimizers.load_named_state(model, found.load("optimizer", like, self.world))
        self.spikes = SpikeDetector(self.at.recent)


def _counters(found: Checkpoint) -> Counters:
    """The counters of a checkpoint, each of its own type."""
    file = found.path / "state.json"
    state = fields(found.state, str(file), _COUNTERS)
    if state.keys() != _COUNTERS.keys() or state["step"] != found.step:
        raise RunError(f"{file} is not the state of this checkpoint")
    return Counters(**state)


_COUNTERS: dict[str, Check] = {
    **dict.fromkeys(("step", "skipped", "window_tokens", "window_losses", "validated"), whole()),
    **dict.fromkeys(("seconds", "flops", "window_seconds", "window_flops"), number),
    "updated": one_of(True, False),
    "window_loss": number,
    **dict.fromkeys(("norm", "validation"), optional(number)),
    "recent": list_of(number, 10_000),
}
"""What state.json must look like."""
