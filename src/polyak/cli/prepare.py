"""`polyak prepare`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyak.checks import check_whole
from polyak.cli._options import parse
from polyak.data.split import NEAR, SPLIT, check_split, said
from polyak.errors import ConfigError
from polyak.output import say, tell

if TYPE_CHECKING:
    from polyak.data.prepare import Done, Prepared, Progress

DESCRIPTION = """Turn a corpus into token shards with a hashed manifest, once. Killed on the
way, the same command goes on; the result is the same to the last byte. Training
commands find it by the corpus's and the tokenizer's names.

corpora: stdlib, prose (of this Python), tinystories, tinystories-own, openwebtext,
wikitext-103, wikitext-103-lines, c4, lambada (of the hub, or of a copy of it in
$POLYAK_HUB), or the path of a text, .jsonl, .ndjson (also .gz), .json (a list of
records) or .parquet file, or of a folder of them. tinystories[documents=1000] takes
the first documents only.
tokenizers: bytes, gpt2, bpe-N (trained on the corpus), or a tokenizer's path.

examples:
  polyak prepare tinystories --tokenizer gpt2
  polyak prepare openwebtext --tokenizer gpt2 --workers 16 --cache /data/polyak
  polyak prepare c4[documents=5000] --tokenizer runs/mine/model
  polyak prepare my-texts/ --tokenizer bpe-8192 --validation-fraction 0.01
  polyak prepare tinystories --tokenizer gpt2 --verify
  polyak prepare stdlib --tokenizer bpe-4096 --bench"""

_LINE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """What is prepared, and how."""

    corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """A corpus's name or path."""
    tokenizer: str = "bytes"
    """`bytes`, `gpt2`, `bpe-N`, or the path of a tokenizer's folder."""
    text_field: str = "text"
    """The field with the text of JSONL, Parquet and hub records."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON, such as `latin-1`."""
    validation_fraction: float | None = None
    """Share of the documents held out; default: the corpus's own (0.05 of most)."""
    near_duplicates: float = NEAR
    """Of a held-out document, the share of its 200-byte windows that may occur in training; with
    more in common it is left out. Not looked for in corpora of the hub."""
    split: int = SPLIT
    """Version of the rule that holds documents out, as in `polyak train`."""
    workers: int | None = None
    """Processes that encode; default: one per core, if the corpus is worth it."""
    shard_tokens: int | None = None
    """Tokens in a shard at most; default: 67,108,864."""
    cache: Path | None = None
    """Where prepared corpora are kept; default: $POLYAK_CACHE or ~/.cache/polyak."""
    verify: bool = False
    """Only check what is there: every shard against its SHA-256."""
    bench: bool = False
    """Only measure MB/s: against a plain loop and datasets.map."""
    rounds: int = 3
    """Rounds of --bench; every round times everything once."""
    out: Path | None = None
    """Folder for the results.json of --bench."""

    def __post_init__(self) -> None:
        for name in ("workers", "shard_tokens", "rounds"):
            check_whole(name, getattr(self, name), optional=True)
        check_split(self.split, self.near_duplicates)
        if self.verify and self.bench:
            raise ConfigError("--verify and --bench exclude each other; give one of them")
        if self.out is not None and not self.bench:
            raise ConfigError("--out is for --bench; --cache says where prepared corpora go")


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(PrepareConfig, "prepare", words, DESCRIPTION)
    from polyak.data.prepare import SHARD_TOKENS, prepare, verify

    chosen: dict[str, Any] = {
        "text_field": config.text_field,
        "encoding": config.encoding,
        "cache": config.cache,
        "validation_fraction": config.validation_fraction,
        "split": config.split,
        "near_duplicates": config.near_duplicates,
        "shard_tokens": config.shard_tokens or SHARD_TOKENS,
    }
    with _one_line_warnings():
        if config.bench:
            return _bench(config)
        if config.verify:
            prepared = verify(config.corpus, config.tokenizer, **chosen)
            _print(prepared, "every shard matches its SHA-256")
            return 0
        started, last = time.monotonic(), None
        with _watching() as (progress, seen):
            prepared = prepare(
                config.corpus,
                config.tokenizer,
                workers=config.workers,
                progress=progress,
                **chosen,
            )
        last = seen[-1] if seen else None
        if last is None:
            note = "prepared before; every shard matches its SHA-256"
        else:
            seconds = time.monotonic() - started
            note = f"{_speed(last, seconds)} ({seconds:,.1f} s)"
            if last.found_bytes:
                note += f", going on after {last.found_bytes / 1e6:,.1f} MB done before"
        _print(prepared, note)
    return 0


def _print(prepared: Prepared, note: str) -> None:
    manifest = prepared.manifest
    sides = [side for side in ("train", "validation", "test") if side in manifest]
    _row("corpus", f"{manifest['corpus']['name']}, {manifest['split']['rule']}")
    about = manifest["tokenizer"]
    _row("tokenizer", f"{about['name']}, {about['vocab_size']:,} tokens")
    for key, name in (("documents", "documents"), ("tokens", "tokens"), ("text_bytes", "bytes")):
        _row(name, ", ".join(f"{side} {manifest[side][key]:,}" for side in sides))
    if skipped := manifest["corpus"]["skipped"]:
        _row("left out", ", ".join(f"{count} {why}" for why, count in skipped.items()))
    if shared := said(manifest["split"]):
        _row("held out", shared)
    _row("speed" if "MB/s" in note else "state", note)
    _row("fingerprint", prepared.fingerprint)
    _row("folder", str(prepared.folder))


def _row(name: str, value: str) -> None:
    say(f"{name:<12} {value}", indent=13)


def _speed(done: Done, seconds: float) -> str:
    return f"{(done.text_bytes - done.found_bytes) / 1e6 / max(seconds, 1e-9):.2f} MB/s"


def progress_line(done: Done, seconds: float) -> str:
    """How far a preparation is, and, where its size is known, how long it still takes."""
    from polyak.words import duration

    here, speed = done.text_bytes - done.found_bytes, _speed(done, seconds)
    read, documents = f"{done.text_bytes / 1e6:,.1f}", f"{done.documents:,} documents"
    if not done.all_bytes:
        return f"{documents}, {read} MB, {done.tokens:,} tokens, {speed}"
    share = min(1.0, done.text_bytes / done.all_bytes)
    rest = max(0, done.all_bytes - done.text_bytes)
    left = f", about {duration(seconds * rest / here)} left" if here and rest else ""
    return f"{share:.0%} of {done.all_bytes / 1e6:,.1f} MB, {documents}, {speed}{left}"


@contextmanager
def _watching() -> Iterator[tuple[Progress, list[Done]]]:
    """A progress function that shows a live line on a terminal, else a line now and then."""
    from polyak.cli._console import Console

    console = Console(stderr=True, highlight=False)
    seen: list[Done] = []
    started = shown = time.monotonic()

    def line(done: Done) -> str:
        return progress_line(done, time.monotonic() - started)

    if console.is_terminal:
        with console.status("reading") as status:

            def update(done: Done) -> None:
                seen[:] = [done]
                status.update(line(done))

            yield update, seen
    else:

        def report(done: Done) -> None:
            nonlocal shown
            seen[:] = [done]
            if time.monotonic() - shown >= _LINE_SECONDS:
                shown = time.monotonic()
                tell(line(done))

        yield report, seen


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        tell(f"polyak prepare: warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _bench(config: PrepareConfig) -> int:
    from polyak.bench import data as bench
    from polyak.cli._console import Console
    from polyak.files import make_folder, write_json
    from polyak.report.pages import check_out
    from polyak.report.tables import house_table

    if config.out is not None:
        check_out(config.out, "prepare bench")
    console = Console(highlight=False)
    found = bench.compare(
        config.corpus,
        config.tokenizer,
        text_field=config.text_field,
        encoding=config.encoding,
        cache=config.cache,
        workers=config.workers,
        rounds=config.rounds,
    )
    table = house_table("", "", "MB/s", "low–high", "speed")
    for row in found["ways"]:
        speed = row["megabytes_per_second"]
        table.add_row(
            row["name"],
            f"{speed['median']:.2f}",
            f"{speed['low']:.2f}–{speed['high']:.2f}",
            f"{row['relative_speed']:.2f}×",
        )
    console.say(
        f"{found['corpus']}: {found['megabytes']:.1f} MB in {found['documents']:,} documents; "
        f"tokenizer {found['tokenizer']}; {found['rounds']} interleaved rounds; "
        f"load {found['load_before']}"
    )
    console.print(table)
    if config.out is not None:
        write_json(make_folder(config.out) / "results.json", found)
    return 0
