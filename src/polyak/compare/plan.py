"""From `CompareConfig` to the runs that have to be done, and what each entry may spend."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polyak import formats
from polyak.compare.config import (
    FULL_RULES,
    FULL_STEPS,
    QUICK_RULES,
    QUICK_STEPS,
    SWEEP_SEED,
    CompareConfig,
    MatchBy,
)
from polyak.compare.entries import Entry, enlarged, parse_entries
from polyak.compare.pool import Job
from polyak.compare.sweep import Grid, Point, parse_grid
from polyak.data.batches import TrainBatches
from polyak.data.encode import available_cores
from polyak.data.prepare import Prepared, prepare
from polyak.data.split import SPLIT, said
from polyak.errors import ConfigError
from polyak.nn.cost import cost
from polyak.nn.pieces import keep
from polyak.reading import fields, table, whole
from polyak.settings import override, replace_at
from polyak.training.config.run import RunConfig
from polyak.training.trainer import check_pieces, check_vocabulary, device_of, validation_set


@dataclass(frozen=True)
class Plan:
    """A resolved comparison.

    Attributes:
        config: what the user asked for.
        base: the run that every entry starts from, before its own rule and steps.
        data: the prepared corpus.
        entries: what is compared; the first is the baseline.
        jobs: runs at once.
        threads: CPU threads of each run.
        notes: what was changed to make budgets equal, for the report.
    """

    config: CompareConfig
    base: RunConfig
    data: Prepared
    entries: tuple[Entry, ...]
    jobs: int
    threads: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> Entry:
        """The entry that differences are taken from."""
        return self.entries[0]

    def run_config(self, entry: Entry) -> RunConfig:
        """The entry's run with the baseline's steps and seed 0."""
        return dataclasses.replace(self.base, model=entry.model, threads=self.threads)

    def with_kept_code(self) -> Plan:
        """The plan with users' rules as copied into the comparison's folder.

        Raises:
            RunError: the folder cannot be written.
        """
        entries = [
            dataclasses.replace(entry, model=keep(self.config.out, entry.model))
            for entry in self.entries
        ]
        return dataclasses.replace(self, entries=tuple(entries))

    def steps(self, speeds: dict[str, dict[str, float]]) -> dict[str, int]:
        """Optimizer steps of each entry under `match`, by name.

        Args:
            speeds: measured tokens per second by entry; only `seconds` uses them. An entry that
                has none, because it cannot train, gets the baseline's steps.
        """
        steps = self.base.training.steps
        if self.config.match in ("tokens", "params"):
            return {entry.name: steps for entry in self.entries}
        prices = {}
        for entry in self.entries:
            if self.config.match == "flops":
                prices[entry.name] = float(cost(entry.model).training_flops_per_token)
            else:
                speed = speeds.get(entry.name, speeds[self.baseline.name])
                prices[entry.name] = 1 / speed["median"]
        budget = steps * prices[self.baseline.name]
        return {name: max(1, round(budget / price)) for name, price in prices.items()}

    @property
    def grid(self) -> Grid | None:
        """What every entry's rates are chosen from, if there is a sweep."""
        return parse_grid(self.config.sweep) if self.config.sweep else None

    def run_jobs(self, steps: dict[str, int], rates: Mapping[str, Point | None]) -> list[Job]:
        """All runs, seed by seed so that pairs are complete early.

        Args:
            steps: of each entry.
            rates: each entry's own values of the swept fields, if there was a sweep.
        """
        jobs = []
        for seed in range(self.config.seeds):
            for entry in self.entries:
                config, chosen = self.run_config(entry), rates.get(entry.name)
                if chosen is not None and (grid := self.grid) is not None:
                    config = grid.at(config, chosen)
                folder = self.config.out / "runs" / f"{entry.slug}-seed{seed}"
                jobs.append(Job(entry.name, seed, _with(config, seed, steps[entry.name]), folder))
        return jobs

    def sweep_jobs(self, steps: dict[str, int]) -> list[tuple[Point, Job]]:
        """The runs that choose each entry's rates, with the values each one tries."""
        grid, jobs = self.grid, list[tuple[Point, Job]]()
        if grid is None:
            return jobs
        for entry in self.entries:
            for point in grid.points:
                for seed in range(SWEEP_SEED, SWEEP_SEED + self.config.sweep_seeds):
                    config = grid.at(self.run_config(entry), point)
                    name = f"{entry.slug}-{grid.folder_name(point)}-seed{seed}"
                    folder = self.config.out / "sweep" / name
                    job = Job(entry.name, seed, _with(config, seed, steps[entry.name]), folder)
                    jobs.append((point, job))
        return jobs


def _with(config: RunConfig, seed: int, steps: int) -> RunConfig:
    training = dataclasses.replace(config.training, seed=seed, steps=steps)
    return dataclasses.replace(config, training=training)


def make_plan(config: CompareConfig) -> Plan:
    """Resolve everything that can be wrong before the first run begins.

    Raises:
        PolyakError: any bad input.
    """
    base = _base(config)
    rules = QUICK_RULES if config.quick else FULL_RULES if config.rules is None else config.rules
    parse_entries(rules, base.model, config.out)  # before the corpus, which can take minutes
    if config.sweep:
        parse_grid(
            config.sweep, [assignment.partition("=")[0].strip() for assignment in config.set]
        )
    device = device_of(config.device)
    data = prepare(base.corpus, base.tokenizer, **base.reading)
    if base.model.vocab_size != data.tokenizer.vocab_size and not any(
        assignment.startswith("model.vocab_size") for assignment in config.set
    ):
        base = replace_at(base, "model.vocab_size", data.tokenizer.vocab_size)
    validation_set(base, data)  # these two raise where the corpus is too short
    TrainBatches(data.train, base.model.context_length, base.training.batch_size, seed=0)
    entries = parse_entries(rules, base.model, config.out)
    notes = []
    if config.match == "params":
        entries, note = _match_parameters(entries, config.match_by)
        notes.append(note)
    for entry in entries:
        check_vocabulary(entry.model, data)
        check_pieces(entry.model, device, base.training)
        cost(entry.model)  # runs a user's step, which may fail
    jobs = config.jobs or (1 if device.type == "cuda" else available_cores())
    threads = max(1, available_cores() // jobs) if device.type == "cpu" else None
    return Plan(config, base, data, entries, jobs, threads, notes)


def _base(config: CompareConfig) -> RunConfig:
    seen: set[str] = set()
    for assignment in config.set:
        key = assignment.partition("=")[0].strip()
        if key in seen:
            raise ConfigError(f"set {assignment!r}: {key} is set twice; leave one out")
        seen.add(key)
        if key.partition(".")[0] not in ("model", "training"):
            raise ConfigError(
                f"set {assignment!r}: write model.FIELD=VALUE or training.FIELD=VALUE"
            )
        for name, instead in (
            ("model.rule", "--rules"),
            ("training.seed", "--seeds"),
            ("training.steps", "--steps"),
        ):
            if key == name:
                raise ConfigError(f"set {assignment!r}: use {instead}")
    base = RunConfig(
        corpus=config.corpus,
        text_field=config.text_field,
        encoding=config.encoding,
        tokenizer=config.tokenizer,
        device=config.device,
        split=_split_of(config.out),
    )
    steps = config.steps or (QUICK_STEPS if config.quick else FULL_STEPS)
    return override(replace_at(base, "training.steps", steps), config.set)


def _split_of(out: Path) -> int:
    """The version of the split: of the comparison that is there, or today's."""
    file = out / "results.json"
    if not file.exists():
        return SPLIT
    wanted = {"corpus": table({"split": whole(1, SPLIT)})}
    found = fields(formats.read_results(file, "comparison"), str(file), wanted)
    return int(found["corpus"]["split"])


def _match_parameters(entries: Sequence[Entry], by: MatchBy) -> tuple[tuple[Entry, ...], str]:
    counts = [cost(entry.model).total_parameters for entry in entries[1:]]
    if not counts:
        raise ConfigError("match='params' needs something to match: name at least two rules")
    target = max(counts)
    before = entries[0]
    if cost(before.model).total_parameters > target:
        raise ConfigError(
            f"match='params' enlarges the baseline, but {before.name} already has more parameters "
            "than every other entry; put a smaller entry first"
        )
    made = enlarged(before, target, by)
    count = cost(made.model).total_parameters
    if any(entry.name == made.name for entry in entries[1:]):
        raise ConfigError(
            f"match='params' makes the baseline {made.name}, which is an entry too; remove one"
        )
    how = {
        "width": f"widening {before.name} from d = {before.model.d_model} to {made.model.d_model}",
        "residual_width": f"widening the residual stream of {before.name}, at fixed attention and "
        f"MLP, from {before.model.stream_width} to {made.model.stream_width}",
        "reinjection": f"giving {before.name} a second table, which is added before every layer",
    }
    note = (
        f"Parameters are matched by {how[by]}: {count:,} against {target:,} of the largest other "
        f"entry ({100 * (count / target - 1):+.1f}%)."
    )
    return (made, *entries[1:]), note


def corpus_summary(plan: Plan) -> dict[str, object]:
    """The corpus as results.json records it."""
    data, validation = plan.data, validation_set(plan.base, plan.data)
    summary = {
        "name": data.manifest["corpus"]["name"],
        "fingerprint": data.fingerprint,
        "tokenizer": data.tokenizer.name,
        "tokenizer_fingerprint": data.tokenizer.fingerprint,
        "vocab_size": data.tokenizer.vocab_size,
        "split": data.manifest["split"].get("version", 1),
        "text_on_both_sides": said(data.manifest["split"]),
        "train_tokens": len(data.train),
        "validation_tokens": validation.tokens,
        "validation_bytes": validation.bytes,
    }
    return summary | ({"skipped_files": dict(data.left_out)} if data.left_out else {})
