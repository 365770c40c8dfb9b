"""Run folders: what one training run leaves behind, and how it is read again.

run.json        resolved settings, fingerprints, versions, hardware; written first
metrics.jsonl   one line per logged step, validation and event
checkpoints/    see `polyak.training.runs.checkpoints`
model/          config.json, model.safetensors, tokenizer.json, and what else Hugging Face reads
result.json     how the run ended; written last, so a run without it did not finish
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak import formats
from polyak.errors import RunError, UnwritableError
from polyak.files import make_folder, read_json, write_atomic, write_json
from polyak.reading import fields, number, optional, whole
from polyak.training.machine import environment
from polyak.training.runs.metrics import rows_of
from polyak.training.runs.model_files import check_weights, write_weights_hash
from polyak.trust import trusting

if TYPE_CHECKING:
    from torch import Tensor

    from polyak.data.tokenizers import Tokenizer
    from polyak.nn.config import ModelConfig
    from polyak.nn.transformer import Transformer
    from polyak.training.config.run import RunConfig
    from polyak.training.processes.distributed import World


_NUMBERS = ("loss", "seconds", "tokens_per_second", "peak_memory_bytes", "tokens")
_RESULT = {"steps": optional(whole()), **dict.fromkeys(_NUMBERS, optional(number))}


@dataclass(frozen=True)
class RunFolder:
    """A run on disk.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def settings_file(self) -> Path:
        """`run.json`."""
        return self.path / "run.json"

    @property
    def metrics_file(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        """`result.json`."""
        return self.path / "result.json"

    @property
    def checkpoints_folder(self) -> Path:
        """`checkpoints/`."""
        return self.path / "checkpoints"

    def identity(self) -> str | None:
        """What tells this run from every other; None before it begins, and for older runs."""
        if not self.settings_file.exists():
            return None
        found = self.recorded().get("identity")
        return found if isinstance(found, str) else None

    def begin(
        self,
        settings: dict[str, Any],
        config: RunConfig | None,
        left_out: Mapping[str, Any] | None = None,
        *,
        identity: str | None = None,
    ) -> None:
        """Start the run afresh: write `run.json`, clear what an unfinished attempt left.

        Args:
            settings: what makes the run the run it is.
            config: what it was started with, to go on with later from anywhere; None for a model
                that was trained elsewhere.
            left_out: files that its corpus does without, see `Prepared.left_out`.
            identity: of the run; drawn when left out.

        Raises:
            RunError: the folder cannot be written.
        """
        if not self.settings_file.exists():
            self._check_unused()
        make_folder(self.path)
        self._clear(self.result_file, self.metrics_file)
        content = {
            "format": formats.current("run"),
            "identity": identity or secrets.token_hex(16),
            "settings": settings,
            "config": None if config is None else _anywhere(config),
            "environment": environment(),
            "resumed": [],
        }
        if left_out:
            content["skipped_files"] = dict(left_out)
        write_json(self.settings_file, content)

    def go_on(
        self, settings: dict[str, Any], config: RunConfig, changes: dict[str, Any], step: int
    ) -> None:
        """Record that the run goes on from a checkpoint, and what was changed for that.

        Raises:
            RunError: the folder cannot be written.
        """
        recorded = self.recorded()
        record = {"step": step, "changes": changes, "environment": environment()}
        resumed = [*recorded.get("resumed", []), record]
        now = {"settings": settings, "config": _anywhere(config), "resumed": resumed}
        # first, so that a kill in between leaves no result of a run that is to go on
        self._clear(self.result_file)
        write_json(self.settings_file, {**recorded, **now})

    def recorded(self) -> dict[str, Any]:
        """The content of `run.json`, brought up to date.

        Raises:
            RunError: it is missing, damaged, no run's, or of a newer polyak.
        """
        recorded = formats.read(self.settings_file, "run")
        if not isinstance(recorded.get("settings"), dict):
            raise RunError(f"{self.settings_file} is not a run's: it has no 'settings'")
        return recorded

    def _check_unused(self) -> None:
        """Refuse what is no run, but holds files that a run writes."""
        for name in ("model", "checkpoints", "metrics.jsonl", "result.json"):
            if (self.path / name).exists():
                raise RunError(
                    f"{self.path} is not a run, since run.json is missing, but holds {name}, which "
                    "a run would write over; choose another --out"
                )

    def _clear(self, *files: Path) -> None:
        try:
            for file in files:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise UnwritableError(f"cannot write in {self.path}: {error.strerror}") from error

    def check(self, settings: dict[str, Any], changeable: Sequence[str] = ()) -> dict[str, Any]:
        """Refuse a folder whose run has other settings.

        Args:
            settings: of the run that is wanted.
            changeable: names that may differ, as `training.steps`.

        Returns:
            The changeable settings that differ: name → [there, wanted].

        Raises:
            RunError: naming up to four other settings that differ, with both values.
        """
        if not self.settings_file.exists():
            return {}
        from polyak.nn.pieces import AXES, same_name

        recorded = self.recorded()
        wanted = json.loads(json.dumps(settings))
        kept = _with_defaults(recorded["settings"])
        differences = {
            name: [there, now]
            for name, there, now in _differences(kept, wanted)
            # a file is its content, which `rule_source` tells, wherever it lies
            if not (name.removeprefix("model.") in AXES and same_name(there, now))
        }
        sources = {f"{axis}_source": registry.kind for axis, registry in AXES.items()}
        refused = [
            f"{name}: {there!r} there, {now!r} now"
            if name not in sources
            else f"{name}: the {sources[name]}'s file is not what it was when the run began"
            for name, (there, now) in differences.items()
            if name not in changeable
        ]
        if refused:
            shown = "; ".join(refused[:4]) + (" …" if len(refused) > 4 else "")
            raise RunError(
                f"{self.path} holds a run with other settings ({shown}); "
                "choose another --out, or remove that folder"
            )
        return differences

    def result(self) -> dict[str, Any] | None:
        """How the run ended, or None if it did not."""
        if not self.result_file.exists():
            return None
        result: dict[str, Any] = read_json(self.result_file)
        try:
            fields(result, str(self.result_file), _RESULT)
            known = {"steps", "loss"} <= result.keys()
        except RunError:
            known = False
        if not known:
            raise RunError(
                f"{self.result_file} is not a result; remove that file, and the run goes on from "
                "its newest checkpoint"
            )
        return result

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The metrics so far, all or of one kind (`train`, `validation`), in order of step.

        A last line cut short by a kill is left out.

        Raises:
            RunError: a line is not a row; it is named.
        """
        try:
            content = self.metrics_file.read_bytes()
        except FileNotFoundError:
            return []
        rows = (row for _, row in rows_of(content, self.metrics_file))
        return [row for row in rows if kind in (None, row["kind"])]


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings; those that an older version did not have yet are at their defaults."""
    from polyak.training.config.run import RunConfig

    defaults: dict[str, Any] = json.loads(json.dumps(RunConfig().to_dict()))
    made = dict(settings)
    for name in ("model", "training"):
        if isinstance(settings.get(name), dict):
            made[name] = {**defaults[name], **settings[name]}
    return made


def _anywhere(config: RunConfig) -> dict[str, Any]:
    """The configuration with paths that hold in every working folder."""
    from polyak.data.corpora import known_names
    from polyak.data.tokenizer_names import parse_name
    from polyak.nn.pieces import portable_values

    values = {**config.to_dict(), "model": portable_values(config.model)}
    if config.corpus.partition("[")[0] not in known_names():
        values["corpus"] = str(Path(config.corpus).expanduser().resolve())
    if config.init is not None:
        values["init"] = str(Path(config.init).expanduser().resolve())
    if parse_name(config.tokenizer).path is not None:
        values["tokenizer"] = str(Path(config.tokenizer).expanduser().resolve())
    return values


def _differences(recorded: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, there, wanted) of every value that differs between two nested mappings."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        for key in sorted({*recorded, *wanted}):
            yield from _differences(
                recorded.get(key), wanted.get(key), f"{name}.{key}" if name else key
            )
    elif recorded != wanted:
        yield name, recorded, wanted


def save_model(model: Transformer, tokenizer: Tokenizer, folder: Path, world: World) -> None:
    """Write configuration, weights (tied ones once) and tokenizer into `folder`.

    `load_run` reads it, and so do Hugging Face's Auto classes (`polyak.training.runs.model_files`).

    Every process calls it, since sharded weights are gathered; the first one writes.

    Raises:
        RunError: the folder cannot be written.
    """
    from safetensors.torch import save

    from polyak.training.dtensors import whole
    from polyak.training.runs.model_files import write_model_files

    weights = {name: whole(p.detach()).cpu().contiguous() for name, p in model.named_parameters()}
    if not world.main:
        return
    make_folder(folder)
    tokenizer.save(folder)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    write_model_files(folder, model.config, tokenizer, dtype)
    write_atomic(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write_weights_hash(folder)


def load_run(folder: str | Path, *, trust_code: bool = False) -> tuple[Transformer, Tokenizer]:
    """Load a finished run.

    Args:
        folder: the run's folder, as written by `polyak train` or `polyak compare`.
        trust_code: run the code of a rule that comes with the run; code of a run that this user
            made on this machine needs no such word.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        RunError: not a run folder, not finished, or its weights do not fit its configuration.
        TrustError: it brings code that was not made here.
    """
    with trusting(trust_code):
        return _load_run(folder)


def _load_run(folder: str | Path) -> tuple[Transformer, Tokenizer]:
    from polyak.data.tokenizer_names import load_tokenizer
    from polyak.nn.cost import cost
    from polyak.nn.transformer import Transformer

    run, model_folder = RunFolder(Path(folder)), Path(folder) / "model"
    if not run.settings_file.exists():
        described = (run.path / "config.json").exists()
        fix = "; it is a model's folder: 'polyak import' makes a run of it" if described else ""
        raise RunError(f"{folder} is not a run: run.json is missing{fix}")
    if run.result() is None:
        raise unfinished(folder)
    config = read_model_config(model_folder)
    check_weights(model_folder)
    weights = read_weights(model_folder / "model.safetensors")
    held, needed = sum(w.numel() for w in weights.values()), cost(config).total_parameters
    if held < needed:  # before so much is allocated
        raise RunError(
            f"{model_folder}: weights do not fit config.json ({held:,} numbers, {needed:,} needed)"
        )
    model = Transformer(config)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"{model_folder / 'model.safetensors'} cannot be loaded: {reason}"
        ) from error
    wrong = unexpected + [name for name in missing if name in dict(model.named_parameters())]
    if wrong:
        raise RunError(f"{model_folder}: weights do not fit config.json ({', '.join(wrong[:3])})")
    return model.eval(), load_tokenizer(model_folder)


def unfinished(folder: str | Path) -> RunError:
    """The error for a run that has to be finished first."""
    return RunError(
        f"{folder} is a run that did not finish: result.json is missing; "
        f"'polyak train --out {folder} --resume' goes on with it"
    )


def check_finished(folder: str | Path) -> None:
    """See that a folder, if it is a run, is a finished one.

    Raises:
        RunError: it did not finish; the message says how it goes on.
    """
    run = RunFolder(Path(folder).expanduser())
    if run.settings_file.exists() and run.result() is None:
        raise unfinished(folder)


def read_model_config(model_folder: Path) -> ModelConfig:
    """The configuration in a run's `model/`.

    Raises:
        RunError: `config.json` is missing, malformed, or not polyak's.
        TrustError: it names code that was not made here.
    """
    from polyak.nn.config import ModelConfig
    from polyak.nn.pieces import code_folder, opened

    values = read_json(model_folder / "config.json")
    if not isinstance(values, dict) or not isinstance(values.get("polyak"), dict):
        raise RunError(f"{model_folder / 'config.json'} is not a model's: it has no 'polyak' part")
    recorded = _recorded_rule_source(model_folder.parent)
    return ModelConfig.from_dict(
        opened(code_folder(model_folder), values["polyak"], recorded=recorded)
    )


def read_run_config(folder: Path) -> RunConfig | None:
    """What a run was started with; None where `run.json` does not say.

    Raises:
        RunError: `run.json` is missing or malformed.
        TrustError: it names code that was not made here.
        ConfigError: a setting cannot work.
    """
    from polyak.nn.pieces import opened
    from polyak.training.config.run import RunConfig

    config = RunFolder(folder).recorded().get("config")
    if not isinstance(config, dict):
        return None
    recorded = _recorded_rule_source(folder)
    model = config.get("model")
    if isinstance(model, dict):
        config = {**config, "model": opened(folder, model, recorded=recorded)}
    return RunConfig.from_dict(config)


def _recorded_rule_source(folder: Path) -> str | None:
    """Hash of the rule's code in `run.json`, for runs that have no copy of it."""
    if not (folder / "run.json").is_file():
        return None
    found = RunFolder(folder).recorded()["settings"].get("rule_source")
    return found if isinstance(found, str) else None


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        RunError: the file is missing, cut short or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{file} cannot be loaded: {reason}") from error
    return weights
