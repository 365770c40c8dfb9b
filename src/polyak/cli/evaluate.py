"""`polyak evaluate`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyak.checks import check_whole
from polyak.cli._options import parse
from polyak.cli._runs import RunPaths, check_named, look
from polyak.errors import ConfigError
from polyak.evaluation.config import EvaluateConfig

DESCRIPTION = """Loss, bits per byte and perplexity of trained models on any text, with
standard errors. Writes report.html and results.json.

examples:
  polyak evaluate runs/mine
  polyak evaluate runs/compare --corpora stdlib,prose,~/texts
  polyak evaluate runs/mine --corpora wikitext-103,lambada,c4 --split validation
  polyak evaluate runs/first runs/second --stride 32 --tokens 200000
  polyak evaluate runs/mine --per-position --attention-entropy --out runs/look
  polyak evaluate runs/mine --tasks hellaswag,arc_easy --out runs/tasks"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(EvaluateConfig):
    """Which runs, on what, and where the page goes."""

    runs: RunPaths = ()
    """Finished runs, comparisons, or folders of runs; differences are from the first."""

    tasks: str | None = None
    """Downstream tasks of lm-evaluation-harness, separated by commas, instead of corpora."""
    shots: int | None = None
    """Examples before each question; None: 10 for hellaswag and 25 for arc_easy, as in the
    papers, and each other task's own number."""
    limit: int | None = None
    """Only so many questions of each task."""
    task_folder: Path | None = None
    """Folder of task descriptions in the harness's YAML, beside its own."""
    batch_size: int = 16
    """Requests of a task at once; it does not change the scores."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        EvaluateConfig.__post_init__(self)
        if self.tasks is not None and not all(name.strip() for name in self.tasks.split(",")):
            raise ConfigError(f"tasks={self.tasks!r} must be names separated by commas")
        for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1)):
            check_whole(name, getattr(self, name), least, optional=True)
        for name in ("shots", "limit", "task_folder"):
            if self.tasks is None and getattr(self, name) is not None:
                raise ConfigError(f"{name} is about downstream tasks; name them with --tasks")
        check_named(self.runs, "evaluate RUN, a run's folder")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(EvaluateOptions, "evaluate", words, DESCRIPTION)
    if config.tasks is not None:
        return _downstream(config, [name.strip() for name in config.tasks.split(",")], words)
    from polyak.study.evaluation.measure import evaluate
    from polyak.study.evaluation.page import tables

    return look(
        "evaluate",
        words,
        config.out,
        lambda line, bar, _: evaluate(config.runs, config, command=line, progress=bar),
        tables,
    )


def _downstream(config: EvaluateOptions, tasks: list[str], words: Sequence[str]) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the harness and of datasets
    from polyak.cli._console import Console
    from polyak.study.evaluation import downstream

    results = downstream.downstream(
        config.runs,
        tasks,
        out=config.out,
        command=shlex.join(["polyak", "evaluate", *words]),
        shots=config.shots,
        limit=config.limit,
        folder=config.task_folder,
        batch_size=config.batch_size,
        device=config.device,
    )
    console = Console(highlight=False)
    console.print(downstream.table(results), width=80)
    console.say(f"Results: {config.out / 'results.json'}")
    return 0
