"""report.html and results.json of any runs: their curves, finished or not, side by side.

It draws and lists; it does no statistics. Runs that differ in nothing but their seed are one
entry and share colour, dash and marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from polyak.errors import RunError
from polyak.files import make_folder, write_atomic, write_json
from polyak.study import figures, run_figures, svg
from polyak.study.pages import check_out, environment, machine_of
from polyak.study.results import commit, mean_scalars, now
from polyak.study.run_rows import read_run
from polyak.study.words import fixed, listed, plural
from polyak.training.machine import environment as this_environment
from polyak.training.run_folders import find_runs, short_names

FORMAT = 1
KIND = "runs"
SHOWN_IN_A_NAME = 3


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
    check_out(out, KIND)
    read = [
        read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)
    ]
    results = gather(read, command=command)
    make_folder(out)
    write_json(out / "results.json", results)
    write_atomic(out / "report.html", render(results))
    return results


def gather(read: Sequence[dict[str, Any]], *, command: str) -> dict[str, Any]:
    """results.json of runs as `read_run` gives them.

    Raises:
        RunError: none of them has logged anything.
    """
    begun = [run for run in read if run["step"]]
    silent = [run["name"] for run in read if not run["step"]]
    if not begun:
        raise RunError(
            f"no metrics yet: {listed(silent)} logged no training step; come back when training "
            "has gone on for a while"
        )
    differ = differing([run["settings"] for run in begun])
    names = _entry_names(begun, differ)
    runs = [{**run, "entry": names[_identity(run)]} for run in begun]
    return {
        "format": FORMAT,
        "kind": KIND,
        "created": now(),
        "command": command,
        "commit": commit(),
        **this_environment(),
        "baseline": runs[0]["entry"],
        "entries": [_entry(name, runs, differ) for name in dict.fromkeys(names.values())],
        "runs": runs,
        "differences": differ,
        "warnings": _warnings(runs, silent),
    }


def _identity(run: Mapping[str, Any]) -> str:
    """What is equal for runs that differ in nothing but their seed."""
    settings = run["settings"]
    return json.dumps(
        {**settings, "training": {**settings["training"], "seed": None}}, sort_keys=True
    )


def _flat(settings: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{name}.{key}" if name else key
        flat.update(_flat(value, dotted) if isinstance(value, Mapping) else {dotted: value})
    return flat


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted names of the settings in which runs differ, without the seed, in a run's order."""
    flat = [_flat(one) for one in settings]
    known = dict.fromkeys(name for one in flat for name in one if name != "training.seed")
    return [name for name in known if any(one.get(name) != flat[0].get(name) for one in flat)]


def _entry_names(runs: Sequence[Mapping[str, Any]], differ: Sequence[str]) -> dict[str, str]:
    """A name for each identity: the rule and, in brackets as in `compare`, what else differs.

    Where that would be long or not tell the entries apart, the first run's name serves,
    without its seed.
    """
    first = {_identity(run): run for run in reversed(runs)}
    telling = [n for n in differ if n != "model.rule" and not n.endswith(("fingerprint", "source"))]
    names = {}
    for identity, run in first.items():
        flat = _flat(run["settings"])
        values = [f"{name.removeprefix('model.')}={_word(flat.get(name))}" for name in telling]
        brackets = f"[{','.join(values)}]" if values else ""
        names[identity] = f"{run['rule']}{brackets}"
    if len(telling) > SHOWN_IN_A_NAME or len(set(names.values())) < len(names):
        names = {key: run["name"] for key, run in first.items()}
        shorter = {key: re.sub(r"[-_/ ]*seed[-_ ]?\d+$", "", name) for key, name in names.items()}
        if all(shorter.values()) and len(set(shorter.values())) == len(names):
            names = shorter
    return {identity: names[identity] for identity in dict.fromkeys(map(_identity, runs))}


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _entry(name: str, runs: Sequence[Mapping[str, Any]], differ: Sequence[str]) -> dict[str, Any]:
    own = [run for run in runs if run["entry"] == name]
    flat = _flat(own[0]["settings"])
    return {
        "name": name,
        "rule": own[0]["rule"],
        "seeds": [run["seed"] for run in own],
        "settings": {key: flat.get(key) for key in differ},
        "scalars": mean_scalars([run["scalars"] for run in own if run["scalars"]]),
    }


def _warnings(runs: Sequence[Mapping[str, Any]], silent: Sequence[str]) -> list[str]:
    """What a reader must know before comparing the curves."""
    said = []
    sets = _validation_sets(runs)
    if len(sets) > 1:
        groups = "; ".join(listed(names) for names in sets.values())
        said.append(
            f"These runs are validated on {len(sets)} different sets, so their validation losses "
            f"cannot be compared. Same set: {groups}."
        )
    machines = {json.dumps(_hardware(run), sort_keys=True) for run in runs}
    if len(machines) > 1:
        said.append(
            "The runs were made on different machines, or with other versions or threads: "
            "times, tokens/s and memory cannot be compared."
        )
    if silent:
        said.append(f"Left out, because nothing is logged yet: {listed(silent)}.")
    return said


def _validation_sets(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of the runs that are validated on each set."""
    sets: dict[str, list[str]] = {}
    for run in runs:
        fingerprint = (run["settings"].get("validation") or {}).get("fingerprint")
        sets.setdefault(str(fingerprint), []).append(run["name"])
    return sets


def _hardware(run: Mapping[str, Any]) -> dict[str, Any]:
    found = run["environment"]
    versions = found.get("versions") or {}
    return {**(found.get("machine") or {}), "torch": versions.get("torch")}


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
    entries = results["entries"]
    keys = {name: Markup(svg.key(style)) for name, style in svg.styles(results).items()}
    events = [(run, _tally(run["events"])) for run in results["runs"] if run["events"]]
    return (
        environment()
        .get_template("runs.html")
        .render(
            r=results,
            entries=entries,
            keys=keys,
            sentence=sentence(results),
            figures=run_figures.all_figures(results),
            rates=run_figures.rate_names(results),
            scalars=figures.scalar_names(results),
            scalar_keys={e["name"]: keys[e["name"]] for e in entries if e["scalars"]},
            events=events,
            smoothing=round(1 / run_figures.MEMORY),
            grouped=max(run["train"]["rows_per_point"] for run in results["runs"]),
            many_seeds=any(len(e["seeds"]) > 1 for e in entries),
            first_machine=machine_of(
                {"versions": {}, "machine": {}, **results["runs"][0]["environment"]}
            ),
            machine=machine_of(results),
        )
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
