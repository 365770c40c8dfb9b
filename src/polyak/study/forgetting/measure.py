"""results.json and report.html of `polyak forgetting`: several runs under one protocol.

Every finished run has a file of its own in `parts/`, named by what decides its result; started
again with the same protocol, it is read instead of measured.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak import formats
from polyak.data.left_out import lines
from polyak.errors import RunError
from polyak.evaluation.config import ForgettingConfig
from polyak.evaluation.forgetting import experiment, forget
from polyak.evaluation.losses import require_causal
from polyak.evaluation.subjects import Subject, load_subjects
from polyak.files import locked, make_folder, sha256_of, sha256_of_json, write_json
from polyak.reading import fields, list_of, number, optional, table, text
from polyak.report.pages import check_out, save
from polyak.settings import defaults
from polyak.study.evaluation.measure import Progress, about
from polyak.study.forgetting.page import finished, render
from polyak.study.parts import check_unchanged
from polyak.training.machine import heading
from polyak.words import listed

KIND = "forgetting"
FIRST = (
    *("onto", "text_field", "steps", "optimizer", "lr", "muon_lr", "weight_decay", "warmup"),
    *("batch_size", "eval_every", "eval_tokens", "seed"),
)
"""Settings of a protocol in release 0.1.0; one that came later counts where it is set."""


def forgetting(
    runs: Sequence[Path],
    config: ForgettingConfig,
    *,
    command: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the forgetting of runs into `config.out`; what is finished is never done again.

    Args:
        runs: runs, comparisons, or folders of runs.
        config: the protocol.
        command: the command line that repeats it.
        progress: called with the share of the work done, and what is under way.

    Returns:
        The content of results.json.

    Raises:
        RunError, DataError, ConfigError: a run or a corpus cannot be used.
        DivergedError: training on the other corpus diverged.
    """
    check_out(config.out, KIND)
    subjects = load_subjects(runs, device=config.device)
    for subject in subjects:
        require_causal(subject)
    experiments = [experiment(subject, config) for subject in subjects]
    make_folder(config.out / "parts")
    with locked(config.out, "polyak forgetting"):
        return _Study(subjects, experiments, config, command, progress).run()


class _Study:
    """One call of `forgetting`."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        experiments: Sequence[dict[str, Any]],
        config: ForgettingConfig,
        command: str,
        progress: Progress | None,
    ) -> None:
        self.subjects, self.experiments, self.config = subjects, experiments, config
        self.progress, self.done, self.written = progress, 0, 0.0
        self.results: dict[str, Any] = {
            **heading(KIND, command, status="partial"),
            "settings": {
                **config.protocol(),
                "device": config.device,
                "out": os.fspath(config.out),
            },
            "baseline": subjects[0].name,
            "entries": [{"name": subject.name} for subject in subjects],
            "runs": [
                {**about(s), "experiment": e, "status": "waiting", "curve": None}
                for s, e in zip(subjects, experiments, strict=True)
            ],
            "warnings": [],
        }

    def run(self) -> dict[str, Any]:
        """Every run that has no file yet; results and page after each."""
        for subject, made, row in zip(
            self.subjects, self.experiments, self.results["runs"], strict=True
        ):
            part = self.config.out / "parts" / f"{_key(made)}.json"
            if part.exists():
                row.update(_kept(part), status="finished")
            else:
                row["status"] = "running"
                teller = self._teller(subject, row)
                try:
                    found = forget(subject, self.config.onto, self.config, teller)
                except BaseException:
                    self._write()  # with the curve so far
                    raise
                sealed = {**found, "sha256": sha256_of_json(found)}
                write_json(part, {"format": formats.current("part"), **sealed})
                row.update(found, status="finished")
            self.done += 1
            self._write()
        self.results["status"] = "complete"
        self._write()
        return self.results

    def _teller(self, subject: Subject, row: dict[str, Any]) -> Any:
        def tell(message: dict[str, Any]) -> None:
            row["curve"] = message["curve"]
            share = message["step"] / message["steps"]
            if self.progress is not None:
                words = f"{subject.name}, step {message['step']:,}"
                self.progress((self.done + share) / len(self.subjects), words)
            if time.monotonic() - self.written > 10:  # what there is if it is killed
                self._write()

        return tell

    def _write(self) -> None:
        self.written = time.monotonic()
        self.results["warnings"] = _warnings(self.results)
        save(self.config.out, self.results, render)


_LOSS = table({"value": number, "se": optional(number)})
_SIDE = table(
    {when: table({"fingerprint": text(64), "loss": _LOSS}) for when in ("before", "after")}
)
_CURVE = table({name: list_of(number) for name in ("step", "source", "target")})
_PART = {
    "curve": _CURVE,
    **dict.fromkeys(("source", "target"), _SIDE),
    **dict.fromkeys(("forgetting", "plasticity"), _LOSS),
    "seconds": number,
    "sha256": optional(text(64)),
}


def _kept(part: Path) -> dict[str, Any]:
    """What an earlier start measured.

    Raises:
        RunError: the file is no such measurement, or was changed since.
    """
    again = "remove it, and it is measured again"
    try:
        content = fields(formats.read(part, "part"), str(part), _PART)
    except RunError as problem:
        raise RunError(f"{problem}; {again}") from None
    found = {k: v for k, v in content.items() if k not in ("format", "sha256")}
    check_unchanged(found, content.get("sha256"), str(part), again)
    return found


def _key(made: Mapping[str, Any]) -> str:
    """The name of a measurement's file, the same in every version that can make it."""
    later = defaults(ForgettingConfig)
    protocol = {
        name: value
        for name, value in made["protocol"].items()
        if name in FIRST or value != later[name]
    }
    return sha256_of(json.dumps({**made, "protocol": protocol}, sort_keys=True).encode())[:24]


def _warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing rows."""
    said, runs = lines(results["runs"]), results["runs"]
    optimizers = sorted({str(run["trained_with"]) for run in runs})
    if len(optimizers) > 1:
        said.append(
            f"The runs were trained with different optimizers ({listed(optimizers)}), which by "
            "itself changes how much is forgotten: compare within one."
        )
    for side in ("source", "target"):
        sets = {run[side]["before"]["fingerprint"] for run in finished(results)}
        if len(sets) > 1:
            said.append(
                f"The runs' {side} losses are on different tokens (another context, tokenizer or "
                "corpus), and so were their batches: rows cannot be set side by side."
            )
    waiting = [run["name"] for run in runs if run["status"] != "finished"]
    if waiting:
        said.append(f"Not finished: {listed(waiting)}.")
    return said
