"""`polyak study landscape`: losses, sharpness, forgetting and Jacobian spectra of several runs.

Every measurement is a part with a file of its own (`polyak.study.parts`), so that the study goes
on where it was stopped; the page is written anew as they come.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak import formats
from polyak.analysis.config import SharpnessConfig
from polyak.analysis.spectrum_config import SpectrumConfig
from polyak.data.left_out import lines, skipped_files
from polyak.evaluation.config import ForgettingConfig, corpora_of
from polyak.evaluation.forgetting import experiment, forget
from polyak.evaluation.losses import require_causal, summary, token_losses
from polyak.evaluation.subjects import Subject, corpus_of, load_subject, token_set
from polyak.files import locked, make_folder, sha256_of
from polyak.reading import Check
from polyak.report.pages import check_out, save
from polyak.settings import defaults
from polyak.study.landscape import found as kept
from polyak.study.landscape import work
from polyak.study.landscape.config import LandscapeConfig
from polyak.study.landscape.properties import OWN, PROPERTIES
from polyak.study.landscape.results import complete, put_first, value_of
from polyak.study.parts import Found, Part, Tick, expected, measure_all
from polyak.study.runs.measure import gather, read_run
from polyak.study.sharpness.measure import sharpness_of
from polyak.study.spectrum.measure import persistence_of, spectrum_of, tokens_of
from polyak.training.runs.finding import find_runs, short_names
from polyak.training.runs.folder import unfinished

KIND = "landscape"
PAGE_EVERY = 10.0
"""Seconds between pages that are written on the way: to draw one takes one or two."""


_Planned = tuple[dict[str, Any], float, Callable[[Tick], Found], Check]
"""What decides a part's result, the seconds it takes, how it is measured, and what it must be."""


def landscape(
    runs: Sequence[Path],
    config: LandscapeConfig,
    *,
    command: str,
    planned: Callable[[int, int, float], None] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, Any]:
    """Measure runs into `config.out`, or go on where an earlier call was stopped.

    Args:
        runs: finished runs, comparisons, or folders of runs.
        config: what is measured.
        command: the command line that repeats it.
        planned: called first, with the number of measurements, how many of them are there
            already, and the seconds expected for the rest.
        progress: called with the share of the work done, and what is under way.

    Returns:
        The content of results.json.

    Raises:
        PolyakError: a run or a corpus cannot be used, or `config.out` holds something else.
    """
    check_out(config.out, KIND)
    folders = find_runs(runs)
    names = short_names(folders)
    read = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    for run in read:
        if run["status"] != "finished":
            raise unfinished(run["folder"])
    results = gather(read, command=command)
    put_first(results, config.baseline)
    study = _Study(config, results)
    make_folder(config.out)
    with locked(config.out, "polyak study landscape"):
        parts = study.parts()
        if planned is not None:
            every, there, seconds = expected(parts, config.out)
            planned(every, there, seconds + work.FIXED)
        study.missing = [part.subject + ": " + part.kind for part in parts]
        try:
            measure_all(parts, config.out, after_each=study.keep, progress=progress)
        except BaseException:
            study.write()  # whatever stops us, the page shows what is there
            raise
        return study.write()


DEFAULTS: dict[str, dict[str, Any]] = {
    "sharpness": defaults(SharpnessConfig),
    "spectrum": defaults(SpectrumConfig),
    "forgetting": {"protocol": defaults(ForgettingConfig)},
}
"""What a part that an older version measured is taken to have been asked for, by kind."""


class _Study:
    """The state of a study while it runs."""

    def __init__(self, config: LandscapeConfig, results: dict[str, Any]) -> None:
        self.config, self.results = config, results
        self.runs: dict[str, dict[str, Any]] = {}
        for run in results["runs"]:
            run.pop("train")  # curves of training; validation is enough here
            run["measured"] = {}
            self.runs[run["name"]] = run
        self.missing: list[str] = []
        self.written = time.monotonic()

    def parts(self) -> list[Part]:
        """Every measurement of every run, cheap kinds first."""
        config = self.config
        speeds: dict[str, float] = {}
        made: dict[str, list[Part]] = {kind: [] for kind in config.chosen}
        seen = set()
        for run in self.results["runs"]:
            subject = load_subject(run["folder"], device=config.device)
            require_causal(subject)
            weights = sha256_of(subject.folder / "model" / "model.safetensors")
            shape = str(subject.settings["model"])
            if shape not in speeds:
                speeds[shape] = work.tokens_per_second(subject)
            speed = speeds[shape]
            self.results.setdefault("corpus", subject.settings["corpus"]["name"])
            first = run["entry"] not in seen
            seen.add(run["entry"])
            for kind in made:
                if kind == "spectrum" and config.spectrum_runs == "first" and not first:
                    continue
                key, seconds, measure, fits = getattr(self, f"_{kind}")(subject, speed)
                made[kind].append(
                    Part(
                        *(run["name"], kind, {"weights": weights, **key}, seconds, measure),
                        defaults=DEFAULTS.get(kind, {}),
                        fits=fits,
                    )
                )
        return [part for kind in made for part in made[kind]]

    def keep(self, part: Part, found: Found) -> None:
        """Take up what a part found, and write the page if the last one is not of just now."""
        self.runs[part.subject]["measured"][part.kind] = found
        self.missing.remove(part.subject + ": " + part.kind)
        if time.monotonic() - self.written > PAGE_EVERY:
            self.write()

    def write(self) -> dict[str, Any]:
        """results.json and report.html as things stand."""
        from polyak.study.landscape.page import render

        settings = {
            f.name: getattr(self.config, f.name) for f in dataclasses.fields(LandscapeConfig)
        }
        filled = complete(
            {
                **self.results,
                "warnings": [*self.results["warnings"], *lines(self.results["runs"])],
                "format": formats.current(KIND),
                "kind": KIND,
                "status": "partial" if self.missing else "complete",
                "missing": self.missing,
                "settings": {**settings, "out": os.fspath(self.config.out)},
            },
            PROPERTIES,
        )
        save(self.config.out, filled, render)
        self.written = time.monotonic()
        return filled

    def _evaluate(self, subject: Subject, speed: float) -> _Planned:
        config = self.config
        others = [name for name in corpora_of(config.corpora) if name is not None]
        corpora = {OWN: None, **{name: name for name in others}}
        key = {
            "tokens": config.eval_tokens,
            "corpora": {
                name: corpus_of(subject, corpus, **config.reading).fingerprint
                for name, corpus in corpora.items()
            },
        }
        seconds = work.losses(len(corpora) * config.eval_tokens, speed)

        def measure(tick: Tick) -> Found:
            found: Found = {}
            for place, (name, corpus) in enumerate(corpora.items()):
                tick(place / len(corpora))
                losses = token_losses(subject, corpus, tokens=config.eval_tokens, **config.reading)
                found[name] = summary(losses)
            values = [found[name]["loss"]["value"] for name in others]
            found["others"] = sum(values) / len(values) if values else None
            return found

        return key, seconds, measure, kept.evaluate(tuple(corpora))

    def _sharpness(self, subject: Subject, speed: float) -> _Planned:
        config = self.config
        wanted = SharpnessConfig(
            tokens=config.sharpness_tokens,
            top_k=5,  # deflating the outliers makes the trace cheap
            trace_precision=config.trace_precision,
            density_probes=0,
            slice_radius=0.0,
            rho=(config.rho,),
            seed=config.seed,
            device=config.device,
        )
        tokens = token_set(subject, tokens=config.sharpness_tokens)
        key = {"fingerprint": tokens.fingerprint, **_settings(wanted)}
        seconds = work.sharpness(tokens.tokens, speed)

        def measure(tick: Tick) -> Found:
            found = sharpness_of(subject, tokens, wanted, lambda share, _: tick(share))
            for end in ("top", "bottom"):
                pairs = found["spectrum"][end]
                found[end] = pairs[0]["value"] if pairs and pairs[0]["converged"] else None
            found["rise_found"] = found["rise"]["rises"][0]["at_least"]
            return {**found, "corpus": tokens.corpus, **skipped_files(tokens.left_out)}

        return key, seconds, measure, kept.sharpness(wanted)

    def _forgetting(self, subject: Subject, speed: float) -> _Planned:
        config = self.config
        wanted = ForgettingConfig(
            onto=config.onto,
            **config.reading,
            steps=config.forgetting_steps,
            warmup=min(50, config.forgetting_steps // 3),
            lr=config.forgetting_lr,
            optimizer=config.forgetting_optimizer,
            eval_tokens=config.eval_tokens,
            seed=config.seed,
            device=config.device,
        )
        trained = config.forgetting_steps * wanted.batch_size * subject.context_length
        seconds = trained / speed + work.losses(11 * 2 * config.eval_tokens, speed)

        def measure(tick: Tick) -> Found:
            def step(at: Mapping[str, Any]) -> None:
                tick(at["step"] / at["steps"])

            return forget(subject, config.onto, wanted, step)

        return experiment(subject, wanted), seconds, measure, kept.forgetting

    def _spectrum(self, subject: Subject, speed: float) -> _Planned:
        wanted = SpectrumConfig(
            length=self.config.spectrum_length,
            parts="a,b",
            quantiles=(0.5,),
            seed=self.config.seed,
            device="cpu" if self.config.device == "auto" else self.config.device,
        )
        tokens = tokens_of(subject, wanted)
        key = {"fingerprint": tokens.fingerprint, **_settings(wanted)}
        seconds = work.spectrum(subject.settings["model"]["num_layers"], tokens.tokens, speed)

        def measure(tick: Tick) -> Found:
            found = spectrum_of(subject, tokens, wanted, lambda share, _: tick(share))
            gains = persistence_of(found)
            by_name = {"frozen": gains["a"]["0"], "full": gains.get("b", gains["a"])["0"]}
            later = [value_of(log) for log in by_name["frozen"]["layers"][1:]]
            known = [value for value in later if value is not None]
            return {
                "corpus": tokens.corpus,
                **skipped_files(tokens.left_out),
                "spectra": found,
                "persistence_later": math.fsum(known)
                if known and len(known) == len(later)
                else None,
                "persistence": by_name,
                "persistence_value": {n: value_of(g["total"]) for n, g in by_name.items()},
            }

        return key, seconds, measure, kept.spectrum(wanted)


def _settings(config: SharpnessConfig | SpectrumConfig) -> dict[str, Any]:
    """What of a configuration decides the numbers."""
    fields = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(config, name) for name in fields if name not in ("out", "device")}
