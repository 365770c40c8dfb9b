"""`polyak compare`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.cli._bars import NARROW, Bar
from polyak.cli._options import parse
from polyak.compare.config import CompareConfig
from polyak.output import tell
from polyak.words import duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from polyak.cli._console import Console
    from polyak.compare.plan import Plan
    from polyak.compare.pool import Job, Message

DESCRIPTION = """Train update rules side by side on the same batches and report, with
intervals, how they compare as language models. Started again with the same
--out, it goes on where it was.

examples:
  polyak compare --quick
  polyak compare --rules gradient_descent,nesterov[stream_start=zeros] --seeds 5
  polyak compare --rules gradient_descent,my_rule.py:MyRule --corpus ~/texts
  polyak compare --quick --match seconds --out runs/seconds
  polyak compare --quick --sweep training.muon_lr=0.01,0.02,0.04
  polyak compare --quick --sweep training.muon_lr=0.01,0.02 \\
    --sweep training.adam_lr=1e-3,2e-3
  polyak compare --quick --set model.num_layers=6 --set training.batch_size=16"""


def main(words: Sequence[str]) -> int:
    """Run the command; 0 when all runs finished, 1 when some failed."""
    config = parse(CompareConfig, "compare", words, DESCRIPTION)
    from polyak.cli._console import Console
    from polyak.compare.run import compare
    from polyak.compare.table import print_table

    console = Console()
    display = TerminalDisplay(console)
    try:
        results = compare(
            config, command=shlex.join(["polyak", "compare", *words]), display=display
        )
    finally:
        display.close()
    print_table(results, console)
    console.say(f"Report: {config.out / 'report.html'}")
    failed = [run for run in results["runs"] if run["status"] == "failed"]
    for run in failed:
        tell(f"polyak compare: {run['entry']} seed {run['seed']}: {run['error']}")
    return 1 if failed else 0


class TerminalDisplay:
    """A progress bar with the time left where there is a terminal; else a line per run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._done: dict[Path, float] = {}
        self._ended = 0
        self._runs = 0
        self._todo = 0
        self._lines: Bar | None = None

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def measuring(self, total: int) -> Callable[[], None]:
        """A bar for the speed measurements."""
        self.console.say("Measuring speed, interleaved, one entry at a time …")
        bar, task = self._start(total, "measuring")

        def tick() -> None:
            bar.advance(task)

        return tick

    def planned(self, plan: Plan, runs: int, finished: int, seconds: float) -> None:
        """What is about to happen, and how long it is expected to take."""
        self.close()
        self._runs, self._ended = runs, finished
        base = plan.base
        tokens = base.training.steps * base.training.batch_size * base.model.context_length
        self.console.say(
            f"{len(plan.entries)} entries × {plan.config.seeds} seeds on "
            f"{plan.data.manifest['corpus']['name']}; baseline {plan.baseline.name}: "
            f"{base.training.steps} steps, {tokens / 1e6:.2f} million tokens."
        )
        there = f", {finished} of them finished already" if finished else ""
        self.console.say(f"{runs} runs{there}, {plan.jobs} at a time: about {duration(seconds)}.")
        self.console.say(f"Folder: {plan.config.out}")
        if runs > finished:
            self._todo = runs - finished
            if not self.console.is_terminal:
                self._lines = Bar(self.console, every=60.0)
            self._bar, self._task = self._start(runs - finished, "training")

    def progress(self, job: Job, message: Message) -> None:
        """Move the bar; say when a run ends."""
        if "result" in message or "error" in message:
            self._done[job.folder] = 1.0
            self._ended += 1
            outcome = (
                f"{message['result']['loss']:.4f} nats/token"
                if "result" in message
                else f"failed: {message['error']}"
            )
            text = f"[{self._ended}/{self._runs}] {job.entry} seed {job.seed}: {outcome}"
            self.console.say(text)
        elif "steps" in message:
            self._done[job.folder] = message["step"] / message["steps"]
        done = sum(self._done.values())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        if self._lines is not None:
            self._lines(done / self._todo, "of the training")

    def partial(self, results: Mapping[str, Any], report: Path) -> None:
        """Nothing: the run's own line says enough."""

    def _start(self, total: float, what: str) -> tuple[Progress, TaskID]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.close()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30 if self.console.width >= NARROW else 8),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=120,
        )
        self._bar.start()
        return self._bar, self._bar.add_task(what, total=total)
