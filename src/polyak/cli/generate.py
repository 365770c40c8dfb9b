"""`polyak generate`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polyak import formats
from polyak.checks import check_whole
from polyak.cli._options import parse
from polyak.errors import ConfigError, DataError
from polyak.evaluation.sampling_config import SamplingConfig
from polyak.files import read_text
from polyak.output import show, tell

if TYPE_CHECKING:
    from polyak.evaluation.generation import Piece
    from polyak.evaluation.subjects import Subject

DESCRIPTION = """Continue texts with a trained model. Text appears as it is made; of
several, the first. Standard input is the prompt where none is given.

examples:
  polyak generate runs/mine --prompt "Once upon a time"
  polyak generate runs/mine --prompt "def " --temperature 0 --stop "return"
  polyak generate runs/mine --prompt "A" --prompt "B" --num-samples 3
  polyak generate runs/mine --prompt-file prompts.txt --out runs/texts
  head -c 500 story.txt | polyak generate runs/mine --top-p 0.9"""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(SamplingConfig):
    """Which model continues what, and how."""

    run: Annotated[
        Path | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN", help_behavior_hint="(a finished run)"),
    ] = None
    """A run's folder."""
    prompt: tuple[str, ...] = ()
    """A text to continue; can be given several times."""
    prompt_file: Path | None = None
    """A UTF-8 file with a prompt on every line."""
    num_samples: int = 1
    """Texts for each prompt; the n-th is drawn with seed + n − 1."""
    batch_size: int = 16
    """Texts made at once."""
    stream: Annotated[
        bool,
        tyro.conf.arg(
            help="Show text when all is done.", help_behavior_hint="(default: as it is made)"
        ),
    ] = True
    echo: Annotated[
        bool,
        tyro.conf.arg(
            help="Leave out the prompt before its continuation.",
            help_behavior_hint="(default: shown)",
        ),
    ] = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: CUDA if there is one."""
    out: Path | None = None
    """Folder for results.json."""
    trust_code: bool = False
    """Run the code of a rule that comes with a run; that of runs made here needs no word."""

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        if self.run is None:
            raise ConfigError("no run is named; write polyak generate RUN, a run's folder")
        for name in ("num_samples", "batch_size"):
            check_whole(name, getattr(self, name))
        if self.prompt and self.prompt_file is not None:
            raise ConfigError("prompt and prompt_file are both given; use one of them")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(GenerateConfig, "generate", words, DESCRIPTION)
    prompts = _prompts(config)
    from polyak.evaluation.generation import notes
    from polyak.evaluation.subjects import load_subject
    from polyak.files import make_folder, write_json
    from polyak.report.pages import check_out

    line = shlex.join(["polyak", "generate", *words])
    if config.out is not None:
        check_out(config.out, "generate", line)
    assert config.run is not None
    subject = load_subject(config.run, device=config.device)
    if config.out is not None:
        make_folder(config.out)  # before the work
    for note in notes(subject.model, subject.tokenizer, prompts, config):  # type: ignore[arg-type]
        tell(f"polyak generate: {note}")
    rows = [(prompt, n) for prompt in range(len(prompts)) for n in range(config.num_samples)]
    began = time.perf_counter()
    found: list[dict[str, Any]] = []
    for start in range(0, len(rows), config.batch_size):
        batch = rows[start : start + config.batch_size]
        found += _Batch(config, prompts, batch, len(rows)).run(subject)
    seconds = time.perf_counter() - began
    if config.out is not None:
        results = _results(config, subject, line, found, seconds)
        write_json(config.out / "results.json", results)
        tell(f"Results: {config.out / 'results.json'}")
    return 0


class _Batch:
    """Rows made together, shown one below the other: the first as it is made, then the next."""

    def __init__(
        self,
        config: GenerateConfig,
        prompts: Sequence[str],
        rows: Sequence[tuple[int, int]],
        total: int,
    ) -> None:
        self.config, self.prompts, self.rows, self.total = config, prompts, rows, total
        self.texts = [""] * len(rows)
        self.shown = [0] * len(rows)
        self.current = 0

    def run(self, subject: Subject) -> list[dict[str, Any]]:
        """Make the texts and show them; one record per row."""
        from polyak.evaluation.generation import generate

        seeds = [self.config.seed + sample for _, sample in self.rows]
        texts = [self.prompts[prompt] for prompt, _ in self.rows]
        pieces = generate(
            subject.model,  # type: ignore[arg-type]
            subject.tokenizer,
            texts,
            self.config,
            seeds=seeds,
            quiet=True,  # said once, for all batches
        )
        tokens: list[list[int]] = [[] for _ in self.rows]
        ends: list[str | None] = [None] * len(self.rows)
        self._begin()
        for piece in self._each(pieces):
            tokens[piece.row].append(piece.token)
            ends[piece.row] = piece.end
            self.texts[piece.row] += piece.text
            if self.config.stream:
                self._show(ends)
        self._show(ends)
        return [
            {
                "prompt": self.prompts[prompt],
                "sample": sample,
                "seed": seed,
                "text": text,
                "tokens": row,
                "end": end,
            }
            for (prompt, sample), seed, text, row, end in zip(
                self.rows, seeds, self.texts, tokens, ends, strict=True
            )
        ]

    def _each(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        try:
            yield from pieces
        except KeyboardInterrupt:
            show(flush=True)  # what follows begins on a line of its own
            raise

    def _begin(self) -> None:
        prompt, sample = self.rows[self.current]
        if self.total > 1:
            of = f", sample {sample + 1}" if self.config.num_samples > 1 else ""
            show(f"── prompt {prompt + 1}{of} ──")
        if self.config.echo:
            show(self.prompts[prompt], end="", flush=True)

    def _show(self, ends: Sequence[str | None]) -> None:
        """Show what is new of the current row; after its end, the rows below it."""
        while self.current < len(self.rows):
            new = self.texts[self.current][self.shown[self.current] :]
            if new:
                show(new, end="", flush=True)
                self.shown[self.current] += len(new)
            if ends[self.current] is None:
                return
            show(flush=True)
            self.current += 1
            if self.current < len(self.rows):
                self._begin()


def _prompts(config: GenerateConfig) -> list[str]:
    """The prompts as given, those of the file, or standard input."""
    if config.prompt:
        return list(config.prompt)
    if config.prompt_file is not None:
        lines = read_text(config.prompt_file, error=DataError).split("\n")
        lines = [line.removesuffix("\r") for line in lines]
        if not lines[-1]:
            lines.pop()
        if not lines:
            raise DataError(f"{config.prompt_file} is empty; write a prompt on every line")
        if "" in lines:
            raise DataError(f"{config.prompt_file}, line {lines.index('') + 1} is empty")
        return lines
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("there is no prompt; give --prompt TEXT, --prompt-file, or pipe one in")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataError(f"standard input is not UTF-8: {problem}") from problem
    return [text.removesuffix("\n").removesuffix("\r")]


def _results(
    config: GenerateConfig,
    subject: Subject,
    line: str,
    found: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    import dataclasses

    from polyak.training.machine import environment

    sampling = {f.name: getattr(config, f.name) for f in dataclasses.fields(SamplingConfig)}
    return {
        "format": formats.current("generate"),
        "kind": "generate",
        "command": line,
        "run": str(config.run),
        "name": subject.name,
        "rule": subject.model.config.rule,  # type: ignore[union-attr]
        "tokenizer": subject.tokenizer.name,
        "sampling": sampling,
        "completions": found,
        "new_tokens": sum(len(row["tokens"]) for row in found),
        "seconds": seconds,
        **environment(),
    }
