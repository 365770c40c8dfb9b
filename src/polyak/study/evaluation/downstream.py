"""results.json of `polyak evaluate --tasks`: scores of any runs on downstream tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from polyak.evaluation.downstream import Tasks
from polyak.evaluation.subjects import load_subjects
from polyak.files import make_folder, write_json
from polyak.report.pages import check_out
from polyak.report.tables import house_table
from polyak.study.evaluation.measure import about
from polyak.training.machine import heading
from polyak.words import folded, with_error

KIND = "downstream"


def downstream(
    runs: Sequence[Path],
    tasks: Sequence[str],
    *,
    out: Path,
    command: str,
    shots: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> dict[str, Any]:
    """Run tasks on every model into `out`/results.json; written model by model.

    Args:
        runs: runs, comparisons, or folders of runs.
        tasks, shots, limit, folder: see `polyak.evaluation.downstream.Tasks`.
        out: folder of results.json.
        command: the command line that repeats it.
        batch_size: rows at once.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        RunError, DataError, ConfigError, MissingExtraError: one of these cannot be used.
    """
    check_out(out, KIND, command)
    subjects = load_subjects(runs, device=device)
    loaded = Tasks(tasks, shots=shots, limit=limit, folder=folder)
    make_folder(out)
    results: dict[str, Any] = {
        **heading(KIND, command, status="partial"),
        "tasks": list(tasks),
        "limit": limit,
        "runs": [],
    }
    results["versions"]["lm_eval"] = loaded.version
    for subject in subjects:
        scores = loaded.evaluate(subject, batch_size)
        results["runs"].append({**about(subject), "scores": scores})
        write_json(out / "results.json", results)
    results["status"] = "complete"
    write_json(out / "results.json", results)
    return results


def table(results: Mapping[str, Any]) -> RenderableType:
    """Every metric with its standard error, and what there is to know about it."""
    parts: list[RenderableType] = []
    for place, first in enumerate(results["runs"][0]["scores"]):
        if not place or first["task"] != results["runs"][0]["scores"][place - 1]["task"]:
            title = f"{first['task']}, {first['shots']}-shot, {first['questions']} questions"
            shown = house_table(title, "", "metric", "score ± s.e.")
            parts.append(shown)
        for run in results["runs"]:
            score = run["scores"][place]
            value = {"value": score["value"], "se": score["standard_error"]}
            shown.add_row(Text(folded(run["name"])), score["metric"], with_error(value))
    for run in results["runs"]:
        cut = {s["task"]: s for s in run["scores"] if s["cut_contexts"]}
        parts += [
            Text(
                f"Careful: {run['name']} reads {run['context_length']} tokens; {task} lost the "
                f"beginning of {score['cut_contexts']} of {score['requests']} contexts"
            )
            for task, score in cut.items()
        ]
    if results["limit"] is not None:
        parts.append(Text(f"Careful: only the first {results['limit']} questions of each task"))
    return Group(*parts)
