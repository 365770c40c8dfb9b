"""`compare`: train every (entry, seed) on the same batches and report what differs."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from polyak import formats
from polyak.compare import speed
from polyak.compare.config import CompareConfig
from polyak.compare.page import write_report
from polyak.compare.plan import Plan, make_plan
from polyak.compare.pool import Job, Message, run_jobs
from polyak.compare.results import gather
from polyak.compare.sweep import Point
from polyak.files import locked, make_folder, write_json
from polyak.reading import fields, optional, text
from polyak.report.pages import check_out
from polyak.training.loop import run_settings
from polyak.training.machine import now, process_age
from polyak.training.runs.folder import RunFolder
from polyak.training.trainer import validation_set


class Display(Protocol):
    """What shows the progress of a comparison; the terminal's is in `polyak.cli`."""

    def measuring(self, total: int) -> Callable[[], None]:
        """Speed measurements begin; call the result after each of `total`."""

    def planned(self, plan: Plan, runs: int, finished: int, seconds: float) -> None:
        """`runs` runs are about to begin, `finished` are there already; `seconds` is estimated."""

    def progress(self, job: Job, message: Message) -> None:
        """A job reports."""

    def partial(self, results: Mapping[str, Any], report: Path) -> None:
        """A run ended and the report was written anew."""


class Silent:
    """Shows nothing."""

    def measuring(self, total: int) -> Callable[[], None]:
        """Nothing."""
        return lambda: None

    def planned(self, plan: Plan, runs: int, finished: int, seconds: float) -> None:
        """Nothing."""

    def progress(self, job: Job, message: Message) -> None:
        """Nothing."""

    def partial(self, results: Mapping[str, Any], report: Path) -> None:
        """Nothing."""


@dataclass
class _Study:
    """The state of a comparison while it runs."""

    plan: Plan
    command: str
    created: str
    display: Display
    steps: dict[str, int] = field(default_factory=dict)
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)
    sweeps: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[Path, str] = field(default_factory=dict)
    running: set[Path] = field(default_factory=set)

    @property
    def out(self) -> Path:
        return self.plan.config.out

    def plan_jobs(self) -> tuple[list[tuple[Point, Job]], list[Job]]:
        """The sweep's runs and the comparison's, as the speeds known so far have it.

        Raises:
            RunError: a folder holds a run with other settings.
        """
        self.steps = self.plan.steps(self.speeds)
        sweep, jobs = self.plan.sweep_jobs(self.steps), self.plan.run_jobs(self.steps, {})
        _check_folders(self.plan, [job for _, job in sweep] or jobs)
        return sweep, jobs

    def choose(self, sweep: Sequence[tuple[Point, Job]]) -> list[Job]:
        """The comparison's runs, each entry at its best value of the sweep.

        Runs of an entry for which no value worked count as failed; the others go on.
        """
        self.sweeps = _choose(self.plan, sweep)
        rates = {name: _point(found["chosen"]) for name, found in self.sweeps.items()}
        jobs = self.plan.run_jobs(self.steps, rates)
        for job in jobs:
            if rates[job.entry] is None:
                tried = [run.folder for _, run in sweep if run.entry == job.entry]
                reason = next((self.errors[f] for f in tried if f in self.errors), "no run ended")
                message = f"no value of {self.sweeps[job.entry]['field']} works: {reason}"
                self.errors[job.folder] = message
        return jobs

    def do(self, jobs: Sequence[Job], after_each: Callable[[], object]) -> None:
        """Run what is not finished yet."""

        def report(job: Job, message: Message) -> None:
            self.running.add(job.folder)
            if "result" in message or "error" in message:
                self.running.discard(job.folder)
                if "error" in message:
                    self.errors[job.folder] = message["error"]
                after_each()
            self.display.progress(job, message)

        todo = [
            job
            for job in jobs
            if job.folder not in self.errors and RunFolder(job.folder).result() is None
        ]
        run_jobs(todo, side_by_side=self.plan.jobs, report=report)

    def write(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Write results.json and report.html as things stand."""
        results = gather(
            self.plan,
            jobs,
            command=self.command,
            created=self.created,
            steps=self.steps,
            speeds=self.speeds,
            sweeps=self.sweeps,
            errors=self.errors,
            running=sorted(self.running),
        )
        write_json(self.out / "results.json", results)
        write_report(results, self.out)
        self.display.partial(results, self.out / "report.html")
        return results


def compare(
    config: CompareConfig, *, command: str | None = None, display: Display | None = None
) -> dict[str, Any]:
    """Run a comparison, or go on with one, and return the content of results.json.

    Every (entry, seed) is trained on the same batches in the same order and validated on the same
    set. What is finished in `config.out` is not run again. results.json and report.html are
    written after every run, so they exist also when the comparison is interrupted.

    Args:
        config: what to compare.
        command: the command line to print in the report; made from `config` when left out.
        display: shows progress; nothing is shown when left out.

    Raises:
        PolyakError: bad input; or `config.out` holds other runs or is in use.
    """
    check_out(config.out, "comparison")
    age = process_age()  # of a command: what it took to start and import torch, as runs will
    start_up = age if age is not None and age < 10 * START_UP else START_UP
    plan = make_plan(config)
    make_folder(config.out)
    with locked(config.out, "polyak compare"):
        plan = plan.with_kept_code()  # before anything runs: files may be edited meanwhile
        study = _Study(
            plan, command or command_of(config), _created(config.out), display or Silent()
        )
        if config.match != "seconds":
            study.plan_jobs()  # refuses a folder of other runs before minutes of measuring
        study.speeds = speed.speeds_of(plan, study.display.measuring)
        sweep, jobs = study.plan_jobs()
        speed.keep_speeds(plan, study.speeds)
        everything = [*(job for _, job in sweep), *jobs]
        finished = sum(RunFolder(job.folder).result() is not None for job in everything)
        seconds = _estimate(plan, everything, study.speeds, start_up)
        study.display.planned(plan, len(everything), finished, seconds)
        try:
            if sweep:
                study.do([job for _, job in sweep], lambda: None)
                jobs = study.choose(sweep)
                _check_folders(plan, jobs)
            study.do(jobs, lambda: study.write(jobs))
        except BaseException:
            study.running.clear()
            study.write(jobs)  # whatever stops us, the page shows what is finished
            raise
        return study.write(jobs)


def command_of(config: CompareConfig) -> str:
    """The command line that gives `config`."""
    default = CompareConfig()
    words = ["polyak", "compare"]
    for name in config.__slots__:
        value = getattr(config, name)
        flag = "--" + name.replace("_", "-")
        if value == getattr(default, name):
            continue
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, tuple):
            for item in value:
                words += [flag, item]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def _created(out: Path) -> str:
    file = out / "results.json"
    if not file.exists():
        return now()
    found = fields(formats.read_results(file), str(file), {"created": optional(text(100))})
    return str(found.get("created") or now())


def _check_folders(plan: Plan, jobs: Sequence[Job]) -> None:
    validation = validation_set(plan.base, plan.data)
    for job in jobs:
        RunFolder(job.folder).check(run_settings(job.config, plan.data, validation))


def _estimate(
    plan: Plan, jobs: Sequence[Job], speeds: Mapping[str, dict[str, float]], start_up: float
) -> float:
    """Seconds that the unfinished jobs will take: training, validation and start-up.

    `speeds` were measured one at a time; side by side, runs take a little from each other.
    """
    each: list[float] = []
    validated = validation_set(plan.base, plan.data).tokens
    for job in jobs:
        if RunFolder(job.folder).result() is not None or job.entry not in speeds:
            continue
        recipe, length = job.config.training, job.config.model.context_length
        validations = -(-recipe.steps // recipe.eval_interval)
        tokens: float = recipe.steps * recipe.batch_size * length
        tokens += validations * validated / 3  # no backward pass
        each.append(1.1 * tokens / speeds[job.entry]["median"] + start_up)
    side_by_side = min(plan.jobs, max(1, len(each)))
    return statistics.fmean(each or [0.0]) * -(-len(each) // side_by_side)  # whole turns


START_UP = 4.0
"""Seconds to start a process and import torch, where that was not measured."""


def _choose(plan: Plan, sweep: Sequence[tuple[Point, Job]]) -> dict[str, dict[str, Any]]:
    """Each entry's best point: lowest mean final validation loss; diverged ones are out."""
    grid = plan.grid
    assert grid is not None
    chosen = {}
    for entry in plan.entries:
        losses: list[float | None] = []
        for point in grid.points:
            folders = [job.folder for at, job in sweep if job.entry == entry.name and at == point]
            found = [RunFolder(folder).result() for folder in folders]
            ends = [result["loss"] for result in found if result is not None]
            losses.append(statistics.fmean(ends) if len(ends) == len(folders) else None)
        ended = [(x, at) for x, at in zip(losses, grid.points, strict=True) if x is not None]
        best = min(ended)[1] if ended else None
        chosen[entry.name] = {
            "field": grid.label,
            "values": [grid.shown(point) for point in grid.points],
            "losses": losses,
            "chosen": None if best is None else grid.shown(best),
            "seeds": sorted({job.seed for _, job in sweep}),
            "at_edge": best is not None and grid.at_edge(best),
        }
    return chosen


def _point(shown: Any) -> Point | None:
    """What `Grid.shown` made of a point, as a point."""
    if shown is None:
        return None
    return tuple(shown) if isinstance(shown, list) else (shown,)
