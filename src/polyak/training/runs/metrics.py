"""`metrics.jsonl`: one JSON object per line, flushed as it is written; the record of a run.

Every row holds `kind` and the place it was written at: `step`, `tokens`, `flops` (since the
beginning of the run) and `seconds` (of training; validation, logging and saving left out).

train       the mean `loss` (nats/token) since the row before, `gradient_norm` (before clipping),
            `rates` by parameter group, `tokens_per_second`, `flops_per_second`, `peak_fraction`
            (of a measured matmul rate, see `polyak.training.throughput`), `memory_bytes`,
            `scalars`: the rule's learned scalars by name, substep and depth
validation  `loss` on the fixed validation set (nats/token), `scalars`
checkpoint  one was saved: `checkpoint`, `took` (seconds)
resume      the run went on from `checkpoint` with `changes` of its settings, {} for none
cut         rows after `step`, up to step `until`, were taken out: the run went back to `step`
spike       `loss` stood far above the `usual`
skipped     a step that was not finite was left out: `why`; `skipped` so far, `allowed`
changed     a setting was changed while the run went on

NaN and infinity are not JSON. They are written as null, and the row's `nonfinite` says which
value was what: {"loss": "nan", "rates.muon": "inf"}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from polyak.errors import RunError, UnwritableError
from polyak.files import parse_json, reason, write_atomic
from polyak.reading import fields, list_of, mapping_of, number, optional, text, whole


class MetricsLog:
    """Appends rows to a JSONL file; every row survives a kill right after it was written.

    Args:
        path: the file, created when missing; a last line that a kill cut short is taken off.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b", buffering=0)
            _take_off_part_of_a_line(self._file)
        except OSError as error:
            raise UnwritableError(f"cannot write {path}: {reason(error)}") from error

    def write(self, kind: str, **row: Any) -> None:
        """Append one row; the kinds and their fields are in the module's text.

        Raises:
            RunError: the file cannot be written, for example because the disk is full.
        """
        text = json.dumps({"kind": kind, **finite(row)}, allow_nan=False)
        line = memoryview(f"{text}\n".encode())
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UnwritableError(f"cannot write {self.path}: {reason(error)}") from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _take_off_part_of_a_line(file: Any) -> None:
    """Cut what follows the last line break: the next row would be glued to it."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65_536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for NaN and infinity, and `nonfinite` naming them if there are any."""
    wrong: dict[str, str] = {}
    clean: dict[str, Any] = without_nonfinite(row, "", wrong)
    return {**clean, "nonfinite": wrong} if wrong else clean


def without_nonfinite(value: Any, name: str = "", wrong: dict[str, str] | None = None) -> Any:
    """A value with None for every number that JSON does not have; `wrong` gets what they were."""
    again = partial(without_nonfinite, wrong=wrong)
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return {key: again(inner, f"{prefix}{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [again(inner, f"{name}.{place}") for place, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if wrong is not None:
            wrong[name] = str(value)
        return None
    return value


def keep_until(path: Path, step: int) -> None:
    """Take the rows after `step` out of a log: its run goes on from a checkpoint at that step.

    The lines kept stay as they are, byte for byte. Where rows were taken out, one of kind `cut`
    says up to which step the log had got. The new file is written aside, flushed to the disk
    and renamed over the old one, so a kill leaves either of them whole. A missing file is left
    missing; a last line that a kill cut short is left out.

    Args:
        path: `metrics.jsonl`.
        step: the last one to keep, with all rows written at it.

    Raises:
        RunError: a line is not a row (it is named), or the file cannot be read or written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason(error)}") from error
    kept, until = [], step
    for line, row in rows_of(content, path):
        if row["step"] <= step:
            kept.append(line + b"\n")
        else:
            until = max(until, row["step"], row.get("until") or 0)
    if until > step:
        kept.append(json.dumps({"kind": "cut", "step": step, "until": until}).encode() + b"\n")
    text = b"".join(kept)
    if text != content:
        write_atomic(path, text)


_NUMBER = optional(number)
_ROW = {
    "kind": text(40),
    "step": whole(),
    **dict.fromkeys(("until", "skipped", "allowed"), optional(whole())),
    **dict.fromkeys(("loss", "tokens", "flops", "seconds", "gradient_norm", "took"), _NUMBER),
    **dict.fromkeys(("tokens_per_second", "flops_per_second", "memory_bytes"), _NUMBER),
    **dict.fromkeys(("peak_fraction", "usual"), _NUMBER),
    "rates": optional(mapping_of(_NUMBER)),
    "scalars": optional(mapping_of(mapping_of(list_of(_NUMBER)))),
    "nonfinite": optional(mapping_of(text(40))),
}
"""What a row may hold, by name."""


def rows_of(content: bytes, path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a log's bytes, each with its row; part of a last line is left out.

    Raises:
        RunError: a line is not a row; `path` and the line are named.
    """
    *lines, _ = content.split(b"\n")
    for place, line in enumerate(lines, 1):
        try:
            row = fields(parse_json(line, ""), "", _ROW)
        except RunError:
            raise RunError(
                f"{path}, line {place}: not a row of metrics; repair or remove that line"
            ) from None
        yield line, row


def logged_until(path: Path) -> tuple[int, int]:
    """The last step in a log, and the last that it ever held, cuts included; 0 for none.

    Raises:
        RunError: a line is not a row.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0, 0
    last = ever = 0
    for _, row in rows_of(content, path):
        last = max(last, row["step"])
        ever = max(ever, last, row.get("until") or 0 if row["kind"] == "cut" else 0)
    return last, ever
