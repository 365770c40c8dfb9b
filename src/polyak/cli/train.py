"""`polyak train`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polyak.cli._bars import NARROW
from polyak.cli._options import parse
from polyak.output import tell
from polyak.training.train_config import TrainOptions, resolve

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from polyak.cli._console import Console
    from polyak.training.config.run import RunConfig
    from polyak.training.estimate import Processes

DESCRIPTION = """Train one model by a recipe into a run folder, with checkpoints. Stopped at any
moment, it goes on with --resume.

examples:
  polyak train --rule triple_momentum
  polyak train --corpus ~/texts --tokenizer bpe-4096 --out runs/mine
  polyak train --recipe paper-tinystories --rule adam --dry-run
  polyak train --recipe my.toml --set training.muon_lr=0.01 --track tensorboard
  polyak train --init runs/mine --steps 600 --out runs/more
  polyak train --out runs/mine --resume --steps 4000"""

PLAIN_EVERY = 30.0
"""Seconds between lines where there is no terminal."""


def main(words: Sequence[str]) -> int:
    """Run the command; 0 when the run is finished, or with --dry-run when it can work."""
    options = parse(TrainOptions, "train", words, DESCRIPTION)
    config = resolve(options)
    from polyak.cli._console import Console

    console = Console(highlight=False)
    if options.dry_run:
        from polyak.cli._plan import print_plan

        print_plan(config, options, console)
    else:
        _train(config, options, console)
    return 0


def _train(config: RunConfig, options: TrainOptions, console: Console) -> None:
    from polyak.training.estimate import Processes, check_plan

    processes = Processes.from_environment()
    main = os.environ.get("RANK", "0") == "0"
    if main:  # its error ends the job, and is told once
        check_plan(config, processes)
    if main and not options.resume:
        _check_memory(config, processes)
    from polyak.training.loop import train

    if main:
        console.say(
            f"{config.model.rule} on {config.corpus}, {config.training.steps:,} steps of "
            f"{config.training.batch_size * config.model.context_length:,} tokens; "
            f"folder: {options.out}"
        )
    with TrainDisplay(console, config) as display:
        result = train(
            config,
            options.out,
            resume=options.resume,
            progress=display.progress,
            signals=True,
            last_checkpoint=True,
        )
    if main:
        console.say(
            f"Finished {result['steps']:,} steps: validation loss {result['loss']:.4f} "
            f"nats/token; folder: {options.out}"
        )


def _check_memory(config: RunConfig, processes: Processes) -> None:
    """Refuse what does not fit before the corpus is prepared, which may take hours."""
    from polyak.errors import RuleError
    from polyak.training.estimate import check_memory, device_memory, estimate
    from polyak.training.trainer import device_of

    cuda = device_of(config.device).type == "cuda"
    try:
        needed = estimate(config, processes=processes, cuda=cuda).memory
    except RuleError as error:
        tell(f"polyak train: {error}")
        return
    where = "the CUDA device" if cuda else "this machine"
    check_memory(needed, device_memory(cuda), where, 1 if cuda else processes.local)


class TrainDisplay:
    """One live line where there is a terminal; else a line every half minute.

    Args:
        console: where it goes.
        config: for the tokens of a step.
    """

    def __init__(self, console: Console, config: RunConfig) -> None:
        self.console = console
        self.tokens_per_step = config.training.batch_size * config.model.context_length
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._first: tuple[int, float] | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> TrainDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def progress(self, message: dict[str, Any]) -> None:
        """After a step: {"step", "steps", "loss"}; `loss` is None where the step was skipped."""
        now, step, steps = time.monotonic(), message["step"], message["steps"]
        if self._first is None:  # speed is taken from the first step's end on
            self._first = step, now
        began, since = self._first
        speed = (step - began) * self.tokens_per_step / (now - since) if step > began else None
        left = (steps - step) * self.tokens_per_step / speed if speed else None
        loss = "skipped" if message["loss"] is None else f"loss {message['loss']:.4f}"
        text = f"step {step:,}/{steps:,}  {loss}"
        if speed is not None and left is not None:
            narrow = self.console.is_terminal and self.console.width < NARROW
            text += "" if narrow else f"  {speed:,.0f} tokens/s"
            text += f"  {_duration(left)} left" if step < steps else ""
        if self.console.is_terminal:
            self._live(step, steps, text)
        elif now - self._printed >= PLAIN_EVERY or step == steps:
            self._printed = now
            self.console.say(text)

    def _live(self, step: int, steps: int, text: str) -> None:
        if self._bar is None or self._task is None:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                *([BarColumn(bar_width=16)] if self.console.width >= NARROW else []),
                TextColumn("{task.description}"),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(text, total=steps)
        self._bar.update(self._task, completed=step, description=text)


def _duration(seconds: float) -> str:
    """`1d 3h`, `2h 05m`, `3m 20s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"
