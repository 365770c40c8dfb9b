"""Downstream tasks through lm-evaluation-harness: scores with standard errors."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polyak.errors import DataError, MissingExtraError, PolyakError, UnknownNameError, nearest
from polyak.evaluation.subjects import Subject

PAPER_SHOTS = {"hellaswag": 10, "arc_easy": 25}
"""Examples before the question, as in arXiv:2605.24425; other tasks have their own number."""
_BOOTSTRAP = 1000  # draws, for standard errors that have no formula
_PATIENCE = 5.0  # seconds for the hub's first answer


class Tasks:
    """Downstream tasks, found and loaded once for any number of models.

    Args:
        names: the harness's names of tasks or groups, or those of YAML files in `folder`.
        shots: examples before each question; None: the papers' number, or else the task's own.
        limit: only so many questions of each task.
        folder: of task descriptions in the harness's YAML, beside its own.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        UnknownNameError: there is no such task; the nearest is offered.
        DataError: a task's description or data cannot be read, or the folder does not exist.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        shots: int | None = None,
        limit: int | None = None,
        folder: Path | None = None,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as problem:
            raise MissingExtraError(
                "downstream tasks need lm-evaluation-harness: pip install 'polyak[eval]'"
            ) from problem
        # what it says on its way is neither a result nor a mistake
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if folder is not None and not folder.is_dir():
            raise DataError(f"task folder {folder} does not exist")
        self.names, self.shots, self.limit = list(names), shots, limit
        self.version = version("lm_eval")
        known: list[str] = []
        if folder is not None:  # its own thousands are read only where one of them is named
            self._manager = TaskManager(include_path=str(folder), include_defaults=False)
            known = list(self._manager.all_tasks)
        if not set(names) <= set(known):
            own = [] if folder is None else [str(folder)]
            found = _folders_of(set(names) - set(known))
            paths = [*map(str, found or ()), *own]  # a later one wins
            self._manager = TaskManager(include_path=paths, include_defaults=found is None)
            known = list(self._manager.all_tasks)
        for name in names:
            if name not in known:
                where = "" if folder is None else f" and in {folder}"
                raise UnknownNameError(
                    f"unknown task {name!r}{nearest(name, known)} (lm-evaluation-harness has "
                    f"{len(known)} tasks{where}; `lm_eval ls tasks` lists its own)"
                )
        _without_retries_offline()
        for name in names:
            self._load(name)  # a data set that cannot be had ends it before anything is measured

    def evaluate(self, subject: Subject, batch_size: int = 16) -> list[dict[str, Any]]:
        """Every metric of every task: name, shots, questions, value, standard error (or None).

        Raises:
            DataError: the harness cannot run a task.
        """
        from lm_eval import evaluator

        from polyak.evaluation.harness import HarnessModel

        # it asks git, which complains outside of a repository
        evaluator.get_git_commit_hash = lambda: None
        rows = []
        for name in self.names:
            model = HarnessModel(subject.model, subject.tokenizer, batch_size)  # type: ignore[arg-type]
            shots = PAPER_SHOTS.get(name) if self.shots is None else self.shots
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = evaluator.simple_evaluate(
                        model=model,
                        tasks=[name],
                        num_fewshot=shots,
                        limit=self.limit,
                        bootstrap_iters=_BOOTSTRAP,
                        task_manager=self._manager,
                        log_samples=False,
                    )
            except PolyakError:
                raise
            except Exception as problem:  # the harness has no error class of its own
                raise DataError(f"task {name!r} does not run: {_line(problem)}") from problem
            rows += [
                {**row, "requests": model.requests, "cut_contexts": model.cut}
                for row in _metrics(found)
            ]
        return rows

    def _load(self, name: str) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._manager.load([name])
        except Exception as problem:
            if not isinstance(problem, OSError | EOFError):  # neither missing nor out of reach
                raise DataError(f"task {name!r} cannot be used: {_line(problem)}") from problem
            raise DataError(
                f"task {name!r}: its data cannot be had: {_line(problem)}; go online once so that "
                "the hub's cache has it, or describe a local task in YAML and name its folder "
                "with --task-folder"
            ) from problem


def _folders_of(names: Iterable[str]) -> list[Path] | None:
    """Where the harness keeps these tasks, if each has a file of its name; else None.

    Reading the harness's fourteen thousand descriptions takes a quarter of a minute.
    """
    import lm_eval.tasks

    root, folders = Path(lm_eval.tasks.__file__).parent, []
    for name in names:
        files = root.glob(f"*/{name}.yaml") if re.fullmatch(r"[\w-]+", name) else ()
        line = re.compile(rf"^task: *[\"']?{re.escape(name)}[\"']? *$", re.MULTILINE)
        there = [file.parent for file in files if line.search(file.read_text(encoding="utf-8"))]
        if len(there) != 1:
            return None
        folders += there
    return list(dict.fromkeys(folders))


def _without_retries_offline() -> None:
    """Ask the hub once; where it does not answer, its cache is read, and nothing is tried again.

    `datasets` itself tries every file six times, which takes a minute and a half.
    """
    import datasets
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # no network, a wrong proxy, or already told to stay offline
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def _metrics(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                    "shots": found.get("n-shot", {}).get(task),
                    "questions": found.get("n-samples", {}).get(task, {}).get("effective"),
                    "version": found.get("versions", {}).get(task),
                }
            )
    return rows


def _line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text[:300] or type(problem).__name__
