"""`TrainOptions`: the options of `polyak train`, and the run that they describe. No torch here."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak import formats
from polyak.errors import ConfigError, RunError, unknown
from polyak.training.config import recipes
from polyak.training.config.run import TRACKERS, Device, Parallel, RunConfig

DEFAULT_RECIPE = "quick"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What is trained, and where it goes.

    Raises:
        ConfigError: options that exclude each other.
    """

    recipe: str | None = None
    """A recipe's name, or a TOML file of your own. Default: `quick`."""
    rule: str | None = None
    """Update rule, options in brackets: `triple_momentum[stream_start=zeros]`,
    `path/to/my_rule.py:MyRule`. Default: the recipe's."""
    corpus: str | None = None
    """Corpus name, or path to text files, a folder, JSONL or Parquet. Default: the recipe's."""
    text_field: str | None = None
    """Field that holds the text in JSONL and Parquet. Default: the recipe's, or `text`."""
    encoding: str | None = None
    """Encoding of text files and JSON, such as `latin-1`. Default: the recipe's, or `utf-8`."""
    tokenizer: str | None = None
    """`bytes`, `bpe-N`, `gpt2`, or a tokenizer's folder. Default: the recipe's."""
    init: Path | None = None
    """Start from the weights of this finished run (trained, imported or upgraded) with fresh
    optimizers; model, tokenizer and, unless --corpus or --recipe is given, corpus are the run's."""
    steps: int | None = None
    """Optimizer steps. Default: the recipe's. With --resume: where the run ends now."""
    seed: int | None = None
    """Seed of weights, dropout and the order of the data. Default: the recipe's."""
    device: Device | None = None
    """`cpu`, `cuda` or `auto`. Default: the recipe's, or `auto`."""
    parallel: Parallel | None = None
    """How processes started by torchrun share the work. Default: the recipe's, or `auto`."""
    set: tuple[str, ...] = ()
    """Any other setting: `training.muon_lr=0.01`, `model.num_layers=6`, `threads=2`."""
    track: str | None = None
    """Also send metrics to `tensorboard`, `wandb` or `trackio`; several separated by commas."""
    out: Path = Path("runs/train")
    """The run's folder; a run that is there already is not touched without --resume."""
    resume: bool = False
    """Go on with the run in --out from its newest whole checkpoint, with its own settings. The
    line that began it may be repeated; what would change the run is refused, and shown."""
    trust_code: bool = False
    """Run the code of a rule that comes with the run of --resume or --init; code of runs made
    here needs no word."""
    dry_run: bool = False
    """Print the configuration and what it will take, and train nothing."""
    tokens_per_second: float | None = None
    """With --dry-run: tokens/s of all processes together, to estimate hours from."""
    processes: int | None = None
    """With --dry-run: plan for so many processes. Default: those of torchrun, or one."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_second", "processes"):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            if value is not None and not self.dry_run:
                raise ConfigError(f"{option} plans a run; add --dry-run, or leave it out")
            if value is not None and not value > 0:
                raise ConfigError(f"{option}={value!r} must be above 0")


def resolve(options: TrainOptions) -> RunConfig:
    """The run that the options describe: the recipe or the resumed run, then what they set.

    Raises:
        PolyakError: anything that is mistyped; the nearest valid key is offered.
    """
    if options.resume:
        base = _recorded(options.out)
    if not options.resume or options.recipe is not None or options.init is not None:
        # resumed, these may only repeat what began the run: `RunFolder.check` sees to that
        name = DEFAULT_RECIPE if options.recipe is None else options.recipe
        base = recipes.read(name)
        prefix = f"recipe {name}: "
        recipes.build(base, prefix)  # its own mistakes are its own
        if options.init is not None:
            base = _started_from(options.init, base, keep_corpus=options.recipe is not None)
    if options.resume:  # a run keeps its split, whatever is today's
        base = {"split": _recorded(options.out)["split"], **base}
    given = _given(options)
    return recipes.build(recipes.layered(base, given))


_TEXT = ("corpus", "text_field", "encoding")


def _started_from(folder: Path, base: recipes.Settings, *, keep_corpus: bool) -> recipes.Settings:
    """A recipe's settings with the model, tokenizer and corpus of the run that it starts from."""
    from polyak.training.runs.folder import check_finished, read_model_config

    check_finished(folder)
    model = _flat(RunConfig(model=read_model_config(folder / "model")))
    base = {key: value for key, value in base.items() if not key.startswith("model.")}
    base |= {key: value for key, value in model.items() if key.startswith("model.")}
    recorded = formats.read(folder / "run.json", "run").get("config")
    if isinstance(recorded, dict) and not keep_corpus:
        base |= {key: recorded[key] for key in _TEXT if key in recorded}
    kind = formats.read(folder / "model" / "polyak_tokenizer.json", "tokenizer").get("kind")
    base["tokenizer"] = "bytes" if kind == "bytes" else str(folder / "model")
    return base | {"init": str(folder)}


def _given(options: TrainOptions) -> recipes.Settings:
    """What the options set, by dotted key."""
    given: recipes.Settings = {}
    source: dict[str, str] = {}

    def put(key: str, value: Any, option: str) -> None:
        if key in given:
            both = f"{source[key]} and {option}" if source[key] != option else f"{option} twice"
            raise ConfigError(f"{key} is set by {both}; leave one out")
        given[key], source[key] = value, option

    if options.rule is not None:
        from polyak.nn.rule_text import parse_rule

        found = parse_rule(options.rule, kept=options.out if options.resume else None)
        put("model.rule", found.rule, "--rule")
        for field, text in found.fields.items():
            put(f"model.{field}", recipes.from_text(f"model.{field}", text), "--rule")
        for name, value in found.options.items():
            put(f"{recipes.FREE}{name}", value, "--rule")
        for name, value in found.attention_options.items():
            put(f"{recipes.ATTENTION}{name}", value, "--rule")
    for key in ("corpus", "text_field", "encoding", "tokenizer", "device", "parallel"):
        if getattr(options, key) is not None:
            put(key, getattr(options, key), f"--{key.replace('_', '-')}")
    for key in ("steps", "seed"):
        if getattr(options, key) is not None:
            put(f"training.{key}", getattr(options, key), f"--{key}")
    if options.track is not None:
        put("trackers", _trackers(options.track), "--track")
    for assignment in options.set:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise ConfigError(f"--set {assignment!r} has no '='; write KEY=VALUE")
        try:
            put(key, recipes.from_text(key, text), "--set")
        except ConfigError as error:
            raise type(error)(f"--set {error}") from error
    return given


def _trackers(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
    if not names:
        raise ConfigError(f"--track {text!r} names no tracker; leave it out, or name one")
    return names


def _recorded(folder: Path) -> recipes.Settings:
    """The settings of the run in a folder, by dotted key.

    Raises:
        RunError: there is no run, or it does not say where its corpus lies.
    """
    file = folder / "run.json"
    if not file.exists():
        raise RunError(f"{folder} is not a run: run.json is missing; leave out --resume")
    recorded = formats.read(file, "run").get("config")
    if not isinstance(recorded, dict):
        raise RunError(
            f"{file} has no 'config', the settings to go on with; start again in another --out"
        )
    corpus = recorded.get("corpus")
    if isinstance(corpus, str) and Path(corpus).is_absolute() and not os.path.exists(corpus):
        raise RunError(
            f"the corpus of the run, {corpus}, is no longer there; put it back, or make the run "
            "anew with another corpus"
        )
    from polyak.training.runs.folder import read_run_config

    config = read_run_config(folder)
    assert config is not None, "looked at above"
    return _flat(config)


def _flat(config: RunConfig) -> recipes.Settings:
    settings: recipes.Settings = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in recipes.SECTIONS:
            settings[field.name] = value
            continue
        for inner in dataclasses.fields(value):
            key = f"{field.name}.{inner.name}"
            if f"{key}." in recipes.OPTIONS:
                settings |= {f"{key}.{k}": v for k, v in getattr(value, inner.name).items()}
            else:
                settings[key] = getattr(value, inner.name)
    return settings
