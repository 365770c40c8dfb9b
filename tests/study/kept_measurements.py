"""Small real measurements as studies keep them, and what reads them again; for damaging them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import run_config, write_corpus

from polyak.analysis.config import SharpnessConfig
from polyak.analysis.density import Density
from polyak.analysis.spectrum_config import SpectrumConfig
from polyak.compare import speed
from polyak.data.left_out import lines
from polyak.files import read_json, write_json
from polyak.report.tables import as_text
from polyak.study.landscape.config import LandscapeConfig
from polyak.study.landscape.measure import _Study
from polyak.study.landscape.page import layers
from polyak.study.landscape.properties import PROPERTIES
from polyak.study.landscape.results import complete
from polyak.study.measured import Measurement, _kept
from polyak.study.parts import done, measure_all
from polyak.study.runs.measure import gather, read_run
from polyak.study.sharpness import found as sharpness_found
from polyak.study.sharpness import page as sharpness_page
from polyak.study.sharpness import runs as sharpness_runs
from polyak.study.spectrum import found as spectrum_found
from polyak.study.spectrum import page as spectrum_page
from polyak.study.spectrum.measure import persistence_of, spectra
from polyak.training.loop import train

Read = Callable[[Path], object]
DRAWN = 25
"""Of so many different files one is drawn too: figures take a second."""


def made(folder: Path) -> dict[str, tuple[tuple[str, ...], Read]]:
    """Measure a tiny run into `folder`; by name of a reader its files, and what reads them.

    Of the measurements no hash is kept, as in older files: what is damaged must be seen itself.
    """
    run = folder / "run"
    config = run_config(write_corpus(folder), "triple_momentum", steps=2, d_model=8, num_layers=2)
    train(config, run)
    with pytest.MonkeyPatch.context() as patch:
        for page in (sharpness_page, spectrum_page, sharpness_runs):
            patch.setattr(page, "render", lambda _: "")
        readers = {
            "sharpness": _sharpness(run, folder / "sharpness"),
            "spectrum": _spectrum(run, folder / "spectrum"),
            "study parts": _parts(run, folder / "study parts"),
        }
    rates = {"median": 900.0, "low": 800.5, "high": 1000.0}
    known = {"adam": {"for": [config.model.to_dict(), 4, 1], "tokens_per_second": rates}}
    (folder / "speeds").mkdir()
    write_json(folder / "speeds" / "speeds.json", known)
    return {**readers, "speeds": (("speeds.json",), speed.known_speeds)}


def _sharpness(run: Path, out: Path) -> tuple[tuple[str, ...], Read]:
    config = SharpnessConfig(
        out=out,
        groups=True,
        gauss_newton=True,
        **dict.fromkeys(("tokens", "max_products"), 32),
        **dict.fromkeys(("density_probes", "top_k"), 2),
        density_steps=4,
        max_probes=8,
        trace_precision=9.0,
    )
    sharpness_runs.sharpness([run], config, command="polyak sharpness")

    def read_on(found: dict[str, Any]) -> dict[str, Any]:
        if density := found.get("density"):
            both = ([np.array(one) for one in density[name]] for name in ("nodes", "weights"))
            Density(*map(tuple, both), steps=density["steps"]).to_dict()
        return {}

    fits = sharpness_found.fits(config)
    return ("results.json",), _measured(out, fits, read_on, sharpness_page)


def _spectrum(run: Path, out: Path) -> tuple[tuple[str, ...], Read]:
    config = SpectrumConfig(length=6, sequences=2, out=out)
    spectra([run], config, command="polyak spectrum")

    def read_on(found: dict[str, Any]) -> dict[str, Any]:
        return {"persistence": persistence_of(found)}

    fits = spectrum_found.fits(config)
    return ("results.json",), _measured(out, fits, read_on, spectrum_page)


def _measured(out: Path, fits: Any, read_on: Callable[[Any], Any], page: Any) -> Read:
    """Read as a second start does, which goes on from what is there."""
    results = read_json(out / "results.json")
    for run in results["runs"]:
        run.pop("sha256")
    write_json(out / "results.json", results)
    asked = Measurement(results["kind"], results["settings"], _none, lambda _: "", fits=fits)

    def read(folder: Path) -> None:
        names = [name for name in results["runs"][0] if name not in ("found", "persistence")]
        begun = [{name: run[name] for name in names} for run in results["runs"]]
        runs = _kept(folder, {**results, "runs": begun}, asked)
        for one in runs:
            one.update(read_on(one.get("found") or {}))
        now = json.loads(json.dumps({**results, "runs": runs}, allow_nan=False))
        as_text(page.tables(now))
        if zlib.crc32((folder / "results.json").read_bytes()) % DRAWN == 0:
            page.render(now)

    return read


def _none(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


def _parts(run: Path, out: Path) -> tuple[tuple[str, ...], Read]:
    sizes = {"eval_tokens": 64, "sharpness_tokens": 16, "spectrum_length": 6}
    sizes |= {"forgetting_steps": 1, "trace_precision": 9.0}
    config = LandscapeConfig(**sizes, corpora="own", onto=str(run.parent / "corpus.txt"), out=out)
    results = gather([read_run(run, "run")], command="polyak study landscape")
    results["corpus"] = "corpus"
    parts = _Study(config, results).parts()
    measure_all(parts, out, after_each=lambda *_: None)
    files = []
    for part in parts:
        file = part.file(out)
        write_json(file, {k: v for k, v in read_json(file).items() if k != "sha256"})
        files.append(file.relative_to(out).as_posix())

    def read(folder: Path) -> None:
        measured = {part.kind: done(part, folder) for part in parts}
        runs = [{**results["runs"][0], "measured": {k: v for k, v in measured.items() if v}}]
        filled = complete({**results, "runs": runs}, PROPERTIES)
        json.dumps([filled, lines(runs), layers(filled)], allow_nan=False)

    return tuple(files), read
