"""results.json and report.html of `polyak spectrum`: Jacobian spectra of trained models.

A run's measurement is made of one part for each sequence and map; each is written to
results.json as soon as it is known, so that a stopped command goes on with the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyak.analysis.jacobian import (
    BlockMaps,
    Estimate,
    Map,
    Options,
    block_maps,
    persistence,
    product,
    spectrum,
)
from polyak.analysis.spectrum_config import SpectrumConfig
from polyak.errors import DataError
from polyak.evaluation.subjects import Subject, TokenSet, load_subjects, token_set
from polyak.settings import defaults
from polyak.study.measured import Measurement, measure_runs
from polyak.study.spectrum.found import fits
from polyak.training.machine import peak_memory_bytes
from polyak.training.runs.metrics import without_nonfinite

KIND = "spectrum"
MAPS = {"a": "frozen", "b": "full", "c": "oracle"}
WORK = {"a": 1.0, "b": 2.5, "c": 1.5}
"""Time of a map relative to (a)'s, roughly: for the time left."""
Progress = Callable[[float, str], None]
Found = dict[str, Any]


def spectra(
    runs: Sequence[Path],
    config: SpectrumConfig,
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
    from polyak.study.spectrum.page import render

    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(SpectrumConfig)}
    del settings["out"]
    settings |= {"parts": list(config.chosen), "quantiles": list(config.wanted)}

    def measure(subject: Subject, tokens: TokenSet, progress: Progress, **kept: Any) -> Found:
        return spectrum_of(subject, tokens, config, progress, **kept)

    def derive(found: Found) -> dict[str, Any]:
        return {
            "persistence": persistence_of(found),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    subjects = load_subjects(runs, device=config.device)
    sets = [tokens_of(subject, config) for subject in subjects]
    for subject, tokens in zip(subjects, sets, strict=True):  # refused before anything is written
        _block_maps(subject, tokens, config, 0)
    asked = Measurement(
        KIND, settings, measure, render, derive, defaults(SpectrumConfig), fits(config)
    )
    return measure_runs(asked, subjects, sets, config.out, command=command, progress=progress)


def tokens_of(subject: Subject, config: SpectrumConfig) -> TokenSet:
    """The sequences that a run is looked at on.

    Raises:
        DataError: the corpus has fewer.
        PolyakError: the corpus cannot be used, or the length does not fit the model.
    """
    length = config.length or subject.context_length
    wanted = config.sequences * length
    tokens = token_set(subject, config.corpus, tokens=wanted, length=length, **config.reading)
    if len(tokens.ids) < config.sequences:
        raise DataError(
            f"sequences={config.sequences}: corpus {tokens.corpus!r} has {len(tokens.ids)} of "
            f"{length} tokens; ask for fewer, or a smaller --length"
        )
    return tokens


def _block_maps(
    subject: Subject, tokens: TokenSet, config: SpectrumConfig, sequence: int
) -> list[BlockMaps]:
    return block_maps(
        subject.model,
        tokens.ids[sequence, :-1].to(subject.device),
        dtype=getattr(torch, config.dtype),
        most_bytes=int(config.most_gb * 1e9),
    )


def spectrum_of(
    subject: Subject,
    tokens: TokenSet,
    config: SpectrumConfig,
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
        Spectra by `"SEQUENCE/BLOCK/PART"`, PART one of a, b, c, and `"SEQUENCE/product/PART"`.
        Where a model has no streams, b is a and has no entries of its own.

    Raises:
        ConfigError: the model is not causal, not deterministic, or has dropout on.
    """
    done: Found = dict(found or {})
    options = Options(
        quantiles=config.wanted,
        tolerance=config.tolerance,
        max_products=config.max_products,
        probes=config.probes,
        steps=config.steps,
        seed=config.seed,
    )
    shares: dict[str, float] = {}
    for sequence in range(config.sequences):
        blocks = _block_maps(subject, tokens, config, sequence)
        work = _work(blocks, sequence, config)
        if not shares:
            shares = {
                key: size
                for other in range(config.sequences)
                for key, size, _ in _work(blocks, other, config)
            }
        for key, _, maps in work:
            if progress is not None:
                before = sum(shares[one] for one in shares if one in done)
                progress(before / sum(shares.values()), key)
            if key not in done:
                one = maps[0] if len(maps) == 1 else product(maps, key)
                done[key] = without_nonfinite(spectrum(one, options).to_dict())
                if save is not None:
                    save(done)
            for one in maps:  # one block in memory at a time
                one.release()
    return done


def _work(
    blocks: Sequence[BlockMaps], sequence: int, config: SpectrumConfig
) -> list[tuple[str, float, list[Map]]]:
    """(key, relative time, maps) of what is asked for on one sequence, in order."""
    parts = [part for part in config.chosen if part in MAPS]
    if not blocks[0].streams and "b" in parts:  # the same maps: once
        parts = [part for part in ("a", "c") if part == "a" or part in parts]
    work = [
        (f"{sequence}/{block.index}/{part}", WORK[part], [getattr(block, MAPS[part])])
        for block in blocks
        for part in parts
    ]
    if "d" in config.chosen and len(blocks) > 1:
        work += [
            (
                f"{sequence}/product/{part}",
                len(blocks) * WORK[part],
                [getattr(block, MAPS[part]) for block in blocks],
            )
            for part in parts
            if part != "c"
        ]
    return work


def persistence_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Σ_l log σ_min of (a) and (b): by layer and in total, for every sequence that is complete."""
    made: dict[str, Any] = {}
    for key, one in found.items():
        sequence, block, part = key.split("/")
        if part in "ab" and block != "product":
            layers = made.setdefault(part, {}).setdefault(sequence, {"layers": []})["layers"]
            layers.append(one["log_sigma_min"])
    for sequences in made.values():
        for entry in sequences.values():
            logs = [Estimate(**log) for log in entry["layers"]]
            entry["total"] = without_nonfinite(dataclasses.asdict(persistence(logs)))
    return made
