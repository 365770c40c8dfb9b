"""results.json and report.html of `polyak dynamics`: layers of trained models as optimizer steps.

A run's measurement is made of parts; each is written to results.json as soon as it is known, so
that a stopped command goes on with the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyak.analysis.dynamics.curve import loss_curve
from polyak.analysis.dynamics.energy import applies, energy
from polyak.analysis.dynamics.field import field_of, random_matrices, untrained
from polyak.analysis.dynamics.gauss_newton import share_of
from polyak.analysis.dynamics.lens import Lens
from polyak.analysis.dynamics.path import motion
from polyak.analysis.dynamics.stability import stability
from polyak.analysis.dynamics.summaries import check_sequences
from polyak.analysis.dynamics.trajectory import Watched
from polyak.analysis.dynamics_config import DynamicsConfig
from polyak.analysis.hessian import Surface
from polyak.errors import DataError
from polyak.evaluation.subjects import Subject, TokenSet, load_subjects, token_set
from polyak.report.pages import check_out
from polyak.settings import defaults
from polyak.study.dynamics.found import fits
from polyak.study.measured import Measurement, measure_runs
from polyak.training.machine import peak_memory_bytes
from polyak.training.runs.metrics import without_nonfinite

KIND = "dynamics"
Progress = Callable[[float, str], None]
Found = dict[str, Any]
Piece = tuple[str, float, Callable[[], Mapping[str, Any]]]
"""A name in `found`, relative time, and what measures it."""


def dynamics(
    runs: Sequence[Path],
    config: DynamicsConfig,
    *,
    command: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure runs into `config.out`, or go on where an earlier call with these settings stopped.

    Args:
        runs: runs, comparisons, or folders of runs.
        config: what is measured.
        command: the command line that repeats it.
        progress: called with the share of the work that is done and what is under way.

    Returns:
        The content of results.json.

    Raises:
        PolyakError: a run or corpus cannot be used, or `config.out` holds something else.
    """
    from polyak.study.dynamics.page import render

    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(DynamicsConfig)}
    del settings["out"]
    settings |= {"parts": list(config.chosen)}

    def measure(subject: Subject, tokens: TokenSet, progress: Progress, **kept: Any) -> Found:
        return dynamics_of(subject, tokens, config, progress, **kept)

    check_out(config.out, KIND)
    subjects = load_subjects(runs, device=config.device)
    sets = [tokens_of(subject, config) for subject in subjects]
    for subject, tokens in zip(subjects, sets, strict=True):  # refused before anything is written
        _watched(subject, config).check(tokens.ids.to(subject.device))
    asked = Measurement(
        KIND, settings, measure, render, _derived, defaults(DynamicsConfig), fits(config)
    )
    return measure_runs(asked, subjects, sets, config.out, command=command, progress=progress)


def _derived(_: Found) -> dict[str, Any]:
    return {"peak_memory_bytes": peak_memory_bytes()}


def tokens_of(subject: Subject, config: DynamicsConfig) -> TokenSet:
    """The sequences that a run is looked at on.

    Raises:
        DataError: the corpus or `tokens` has fewer than two, or than `sequences`.
        PolyakError: the corpus cannot be used, or the length does not fit the model.
    """
    found = _tokens(subject, config, config.tokens, "validation")
    check_sequences(found.ids)
    if {*config.chosen} - {"curve", "path"} and len(found.ids) < config.sequences:
        raise DataError(
            f"sequences={config.sequences}: tokens={config.tokens} and the corpus make "
            f"{len(found.ids)} of {found.ids.shape[1] - 1} tokens; ask for fewer, or more tokens"
        )
    return found


def _tokens(subject: Subject, config: DynamicsConfig, count: int, split: str) -> TokenSet:
    length = config.length or subject.context_length
    return token_set(
        subject, config.corpus, tokens=count, length=length, split=split, **config.reading
    )


def _watched(subject: Subject, config: DynamicsConfig) -> Watched:
    return Watched(subject.model, getattr(torch, config.dtype))


def dynamics_of(
    subject: Subject,
    tokens: TokenSet,
    config: DynamicsConfig,
    progress: Progress | None = None,
    *,
    found: Mapping[str, Any] | None = None,
    save: Callable[[Found], None] | None = None,
) -> Found:
    """Everything that `config` asks for about one model, ready for JSON.

    Args:
        subject: the model.
        tokens: its sequences.
        config: what is measured.
        progress: called with the share of the work that is done and what is under way.
        found: parts that an earlier call with the same arguments had finished.
        save: called with all parts found so far whenever there is a new one.

    Returns:
        By part: `curve`, `path`, `field/SUBSTEP`, SUBSTEP from 1, and `field/nulls`; of
        `energy` and `stability`, `PART/trained` and `PART/untrained`; `gauss_newton`. A part that
        does not apply says so under `does_not_apply`.

    Raises:
        ConfigError: the model has one layer, is not causal, or its streams cannot be read.
    """
    done: Found = dict(found or {})
    pieces = _pieces(subject, tokens, config)
    total, before = sum(work for _, work, _ in pieces), 0.0
    for name, work, measure in pieces:
        if progress is not None:
            progress(before / total, name)
        if name not in done:
            done[name] = without_nonfinite(dict(measure()))
            if save is not None:
                save(done)
        before += work
    return done


def _pieces(subject: Subject, tokens: TokenSet, config: DynamicsConfig) -> list[Piece]:
    """What is asked for, in order."""
    watched, ids = _watched(subject, config), tokens.ids.to(subject.device)
    watched.check(ids)
    few = ids[:: len(ids) // config.sequences or 1][: config.sequences]

    def curve() -> dict[str, Any]:
        lens = None
        if config.lens_tokens:
            other = _tokens(subject, config, config.lens_tokens, "train")
            lens = Lens(watched, other.ids.to(subject.device))
        return loss_curve(watched, ids, lens=lens).to_dict()

    def path() -> dict[str, Any]:
        return motion(watched, ids, seed=config.seed).to_dict()

    def gauss_newton() -> dict[str, Any]:
        # in float32, as in `polyak sharpness`: second derivatives cost the most, and errors of
        # probes are larger
        surface = Surface(subject.model, few)
        return share_of(surface, seed=config.seed).to_dict()

    made: dict[str, Callable[[], list[Piece]]] = {
        "curve": lambda: [("curve", 1.0, curve)],
        "path": lambda: [("path", 1.0, path)],
        "field": lambda: _field(subject, watched, few[:, :-1], config),
        "energy": lambda: _twins("energy", 2.0, energy, subject, watched, few[:, :-1], config),
        "stability": lambda: _twins(
            "stability", 40.0, stability, subject, watched, few[:, :-1], config
        ),
        "gauss_newton": lambda: [("gauss_newton", 40.0, gauss_newton)],
    }
    return [piece for part in config.chosen for piece in made[part]()]


def _field(
    subject: Subject, watched: Watched, inputs: torch.Tensor, config: DynamicsConfig
) -> list[Piece]:
    """A piece for each substep, with the untrained twin beside it, and one for random matrices."""
    null = _untrained(subject, config)
    settings: dict[str, Any] = {"probes": config.probes, "seed": config.seed}

    def substep(place: int, label: str) -> Piece:
        def measure() -> dict[str, Any]:
            return {
                "label": label,
                "trained": field_of(watched, inputs, place, **settings).to_dict(),
                "untrained": field_of(null, inputs, place, **settings).to_dict(),
            }

        return f"field/{place + 1}", 10.0, measure

    def nulls() -> dict[str, Any]:
        width = watched.run(inputs[:1]).xs[0].shape[-1]
        found = random_matrices(inputs.shape[1], width, sequences=config.sequences, **settings)
        return {name: dataclasses.asdict(one) for name, one in found.items()}

    steps = [substep(place, label) for place, label in enumerate(watched.labels[1:])]
    return [*steps, ("field/nulls", 1.0, nulls)]


def _twins(
    part: str,
    work: float,
    measure: Callable[..., Any],
    subject: Subject,
    watched: Watched,
    inputs: torch.Tensor,
    config: DynamicsConfig,
) -> list[Piece]:
    """A part of the model, and of its untrained twin."""
    if part == "energy" and (reason := applies(watched)) is not None:
        said = {"does_not_apply": reason}
        return [(part, 0.1, lambda: said)]

    def of(model: Watched) -> Callable[[], dict[str, Any]]:
        return lambda: dict(measure(model, inputs, seed=config.seed).to_dict())

    null = _untrained(subject, config)
    return [
        (f"{part}/{name}", work, of(m)) for name, m in (("trained", watched), ("untrained", null))
    ]


def _untrained(subject: Subject, config: DynamicsConfig) -> Watched:
    twin: Any = subject.model
    return Watched(untrained(twin, config.seed), getattr(torch, config.dtype))
