"""report.html: one self-contained page for a comparison.

It is written again after every run, so it copes with whatever is not there yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyak.compare import figures
from polyak.files import write_atomic
from polyak.report.figures import scalar_names
from polyak.report.pages import draw, keys_of
from polyak.words import loss_places


def render(results: Mapping[str, Any]) -> str:
    """The page for `results` (the content of results.json, after `verdict.complete`).

    Args:
        results: a comparison in results.json's schema; runs may be missing, running or failed.
    """
    entries, keys = results["entries"], keys_of(results)
    sweeps = [entry for entry in entries if entry.get("sweep")]
    settings = {k: v for k, v in results["settings"].items() if k not in ("model", "training")}
    return draw(
        "comparison.html",
        {"statistics": None, **results},
        entries=entries,
        figures=figures.all_figures(results),
        places=loss_places(results),
        failed=[run for run in results["runs"] if run["status"] == "failed"],
        waiting=[run for run in results["runs"] if run["status"] not in ("finished", "failed")],
        scalars=scalar_names(results),
        scalar_keys={e["name"]: keys[e["name"]] for e in entries if e.get("scalars")},
        sweeps=sweeps,
        sweep_keys={e["name"]: keys[e["name"]] for e in sweeps},
        edge=[e["name"] for e in sweeps if e["sweep"]["at_edge"]],
        groups=sorted({g for e in entries for g in e.get("parameter_groups") or {}}),
        equations={e["rule"]: e["equation"] for e in entries if e.get("equation")},
        comparison=list(settings.items()),
    )


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` into `folder`, all or nothing, and return its path."""
    path = Path(folder) / "report.html"
    write_atomic(path, render(results))
    return path


def write_picture(results: Mapping[str, Any], path: Path) -> Path:
    """Write one PNG for a README: differences along training beside the final intervals."""
    path = Path(path)
    write_atomic(path, figures.picture(results))
    return path
