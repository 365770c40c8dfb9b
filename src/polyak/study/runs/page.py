"""report.html and results.json of any runs: their curves, finished or not, side by side.

It draws and lists; it does no statistics. Runs that differ in nothing but their seed are one
entry and share colour, dash and marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.files import make_folder
from polyak.report.figures import scalar_names
from polyak.report.pages import check_out, draw, keys_of, machine_of, save
from polyak.study.runs import figures as run_figures
from polyak.study.runs.measure import KIND, _validation_sets, gather, read_run
from polyak.training.runs.finding import find_runs, short_names
from polyak.words import fixed, listed, plural


def report(paths: Sequence[Path], out: Path, *, command: str) -> dict[str, Any]:
    """Draw the curves of runs into `out/report.html`, with `out/results.json` beside it.

    Args:
        paths: runs, comparisons, or folders of runs.
        out: the folder for both files; made if it is missing.
        command: the command line that repeats the report.

    Returns:
        The content of results.json.

    Raises:
        RunError: a path holds no run, no run has logged anything, or `out` holds the results of
            another command.
    """
    folders = find_runs(paths)
    check_out(out, KIND, command)
    read = [
        read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)
    ]
    results = gather(read, command=command)
    make_folder(out)
    save(out, results, render)
    return results


def sentence(results: Mapping[str, Any]) -> str:
    """What the page says first."""
    runs = results["runs"]
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    if len(runs) == 1:
        (run,) = runs
        at = f"{run['name']} is at step {run['step']:,} of {run['steps']:,}"
        return f"{at}, validation loss {fixed(losses[0], 4)} nats/token." if losses else f"{at}."
    finished = sum(run["status"] == "finished" for run in runs)
    text = f"{len(runs)} runs, {finished} finished"
    if not losses:
        return f"{text}; no validation yet."
    if len(_validation_sets(runs)) > 1:
        return f"{text}; validated on different sets."
    low, high = (fixed(value, 4) for value in (min(losses), max(losses)))
    return f"{text}; last validation losses from {low} to {high} nats/token."


def render(results: Mapping[str, Any]) -> str:
    """The page for `results`, the content of results.json."""
    entries, keys = results["entries"], keys_of(results)
    events = [(run, _tally(run["events"])) for run in results["runs"] if run["events"]]
    return draw(
        "runs.html",
        results,
        entries=entries,
        sentence=sentence(results),
        figures=run_figures.all_figures(results),
        rates=run_figures.rate_names(results),
        scalars=scalar_names(results),
        scalar_keys={e["name"]: keys[e["name"]] for e in entries if e["scalars"]},
        events=events,
        smoothing=round(1 / run_figures.MEMORY),
        grouped=max(run["train"]["rows_per_point"] for run in results["runs"]),
        many_seeds=any(len(e["seeds"]) > 1 for e in entries),
        first_machine=machine_of(
            {"versions": {}, "machine": {}, **results["runs"][0]["environment"]}
        ),
    )


def _tally(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Events of a run in words: `resumed at step 40`, `2 spikes: steps 33 and 61`."""
    words = {"resume": "resumed", "skipped": "step skipped", "changed": "settings changed"}
    said = []
    for kind, word in (*words.items(), ("spike", "spike")):
        steps = [f"{event['step']:,}" for event in events if event["kind"] == kind]
        if not steps:
            continue
        shown = listed(steps if len(steps) <= 8 else [*steps[:7], f"{len(steps) - 7} more"])
        what = plural(len(steps), word) if kind == "spike" else word
        said.append(f"{what} at {'step' if len(steps) == 1 else 'steps'} {shown}")
    repeated = [f"{e['step'] + 1:,} to {e['until']:,}" for e in events if e["kind"] == "cut"]
    if repeated:
        said.append(f"done again: steps {listed(repeated)}")
    changes = {key: v for e in events for key, v in (e.get("changes") or {}).items()}
    said += [f"{key} changed: {_change(value)}" for key, value in changes.items()]
    return said


def _change(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]} to {value[1]}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    return str(value)
