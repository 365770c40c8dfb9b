"""results.json: what a comparison found so far, gathered from its run folders."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.compare.entries import Entry
from polyak.compare.plan import Plan, corpus_summary
from polyak.compare.pool import Job
from polyak.errors import RunError
from polyak.nn.cost import cost
from polyak.nn.pieces import other_sources, portable_values, source_hash
from polyak.nn.placement import placement_of
from polyak.statistics.verdict import complete
from polyak.training.machine import heading, now
from polyak.training.runs.folder import RunFolder


def gather(
    plan: Plan,
    jobs: Sequence[Job],
    *,
    command: str,
    created: str,
    steps: Mapping[str, int],
    speeds: Mapping[str, dict[str, float]],
    sweeps: Mapping[str, dict[str, Any]],
    errors: Mapping[Path, str],
    running: Sequence[Path] = (),
) -> dict[str, Any]:
    """All that results.json holds; finished and unfinished runs alike.

    Args:
        plan: the comparison.
        jobs: its runs.
        command: the command line that repeats it.
        created: when it was begun, ISO 8601.
        steps: optimizer steps by entry.
        speeds: measured training speed by entry.
        sweeps: what each entry's sweep found.
        errors: failures by run folder.
        running: folders of runs under way.
    """
    runs = [
        _run(job, errors.get(job.folder), job.folder in running, plan.config.out) for job in jobs
    ]
    done = all(run["status"] in ("finished", "failed") for run in runs)
    results: dict[str, Any] = {
        **heading("comparison", command, status="complete" if done else "partial", updated=now()),
        "created": created,
        "corpus": corpus_summary(plan),
        "settings": {
            "model": _shared_model(plan),
            "training": {**plan.base.training.to_dict(), "seed": None},
            "match": plan.config.match,
            "seeds": list(range(plan.config.seeds)),
            "jobs": plan.jobs,
            "threads": plan.threads,
            "quick": plan.config.quick,
            "sweep": _sweep_setting(plan),
        },
        "baseline": plan.baseline.name,
        "entries": [
            _entry(entry, jobs, steps[entry.name], speeds.get(entry.name), sweeps.get(entry.name))
            for entry in plan.entries
        ],
        "runs": runs,
        "notes": list(plan.notes),
    }
    results["limits"] = limits(plan, results)
    return complete(results)


def _sweep_setting(plan: Plan) -> str | list[str] | None:
    """As given: nothing, one, or those of a grid."""
    given = list(plan.config.sweep)
    return given if len(given) > 1 else given[0] if given else None


def _shared_model(plan: Plan) -> dict[str, Any]:
    model = plan.base.model.to_dict()
    own = ("rule", "rule_options", "attention", "attention_options")
    return {name: value for name, value in model.items() if name not in own}


def _entry(
    entry: Entry,
    jobs: Sequence[Job],
    steps: int,
    speed: dict[str, float] | None,
    sweep: dict[str, Any] | None,
) -> dict[str, Any]:
    price, placement = cost(entry.model), placement_of(entry.model)
    folders = [RunFolder(job.folder) for job in jobs if job.entry == entry.name]
    finished = [result for folder in folders if (result := folder.result())]
    peaks = [result["peak_memory_bytes"] for result in finished if result["peak_memory_bytes"]]
    return {
        "name": entry.name,
        "rule": placement.name,
        "equation": placement.title,
        "model": portable_values(entry.model),
        "rule_source": source_hash(entry.model.rule),
        **other_sources(entry.model),
        "steps": steps,
        "parameters": price.total_parameters,
        "parameter_groups": dict(price.parameters),
        "flops_per_token": price.training_flops_per_token,
        "state_bytes_per_token": price.state_bytes_per_token,
        "tokens_per_second": speed,
        "peak_memory_bytes": round(statistics.median(peaks)) if peaks else None,
        "sweep": sweep,
        "scalars": mean_scalars(
            [
                scalars
                for f in folders
                if f.result()
                and (rows := f.metrics("validation"))
                and (scalars := rows[-1].get("scalars"))
            ]
        ),
    }


Scalars = Mapping[str, Mapping[str, Sequence[float | None]]]


def mean_scalars(last: Sequence[Scalars]) -> dict[str, dict[str, list[float | None]]] | None:
    """Mean over runs of the learned scalars by name, substep and depth; None for none.

    A scalar that was not finite in some run has no mean.

    Raises:
        RunError: the runs have other scalars, or of other depth: they are not of one model.
    """
    if not last or not last[0]:
        return None
    if any(_form(scalars) != _form(last[0]) for scalars in last):
        raise RunError(
            "metrics.jsonl of runs of one entry log different scalars; one of them was changed"
        )
    return {
        name: {
            substep: [
                _mean(values) for values in zip(*(s[name][substep] for s in last), strict=True)
            ]
            for substep in last[0][name]
        }
        for name in last[0]
    }


def _form(scalars: Scalars) -> dict[str, dict[str, int]]:
    return {
        name: {substep: len(values) for substep, values in substeps.items()}
        for name, substeps in scalars.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if len(there) == len(values) else None


def _run(job: Job, error: str | None, running: bool, out: Path) -> dict[str, Any]:
    folder = RunFolder(job.folder)
    result, rows = folder.result(), folder.metrics("validation")
    status = "failed" if error else "finished" if result else "running" if running else "pending"
    return {
        "entry": job.entry,
        "seed": job.seed,
        "status": status,
        "error": error,
        "folder": str(job.folder.relative_to(out)),
        "seconds": result["seconds"] if result else None,
        "curve": {
            key: [row.get(key) for row in rows]
            for key in ("step", "tokens", "flops", "seconds", "loss")
        },
    }


def limits(plan: Plan, results: Mapping[str, Any]) -> list[str]:
    """What the comparison cannot show, in plain sentences."""
    parameters = {entry["name"]: entry["parameters"] for entry in results["entries"]}
    first = parameters[plan.baseline.name]
    tokens = results["entries"][0]["steps"] * plan.base.training.batch_size
    tokens *= plan.base.model.context_length
    said = [
        f"These are models of {first / 1e6:.2g} million parameters after {tokens / 1e6:.2g} "
        "million tokens. Momentum is known to start behind and cross later, and effects can "
        "shrink, grow or change sign with size and length; this says nothing about models a "
        "hundred times larger.",
        "The intervals cover chance in the initial weights and the data order. They do not cover "
        "the choice of corpus, model size, training length or learning rates.",
    ]
    if not plan.config.sweep:
        said.append(
            "All entries use the same learning rates, tuned for none of them; --sweep gives each "
            "entry its own."
        )
    more = {name: n / first - 1 for name, n in parameters.items() if abs(n / first - 1) > 0.005}
    if more:
        listed = ", ".join(f"{name} {100 * share:+.1f}%" for name, share in more.items())
        said.append(
            f"Parameters are not equal: relative to {plan.baseline.name}, {listed}. A velocity "
            "that starts from its own tables also adds a second input embedding; the zero-start "
            "entry is the control for that, --match params the control for size."
        )
    if plan.config.match == "tokens":
        said.append(
            "Equal tokens are not equal time: compare the tokens/s column, or use --match seconds."
        )
    if plan.jobs > 1:
        said.append(
            f"Runs went {plan.jobs} at a time with {plan.threads} CPU thread(s) each, so seconds "
            "on the curves include what they took from each other; the tokens/s column was "
            "measured beforehand, interleaved, one entry at a time."
        )
    if plan.config.seeds < 3:
        said.append("With fewer than 3 seeds an interval is missing or very wide.")
    return said
