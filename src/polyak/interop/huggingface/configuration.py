"""`PolyakConfig`: a `ModelConfig` as transformers wants it."""

# mypy: disable-error-code="override,no-untyped-call,misc,unused-ignore"
# (signatures of transformers differ between its versions, and some have no types)

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from polyak.errors import AttentionError, ConfigError, PolyakError, RuleError, unknown
from polyak.files import read_json, write_json
from polyak.nn.config import ModelConfig
from polyak.nn.pieces import (
    AXES,
    FOLDER,
    brings_code,
    code_folder,
    keep,
    opened,
    portable_values,
)
from polyak.settings import check_keys
from polyak.training.runs.model_files import (
    MODEL_TYPE,
    STANDARD_NAMES,
    STUB,
    auto_classes,
    standard_values,
)
from polyak.trust import is_trusted, trusting

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_PRIVATE = ("_from_data",)
_DERIVED = ("num_hidden_layers", "num_key_value_heads")
_NAMES = {
    **STANDARD_NAMES,
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_width",
    "hidden_act": "activation",
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    # GPT-2's
    "n_layer": "num_layers",
    "n_embd": "d_model",
    "n_head": "num_heads",
    "n_positions": "context_length",
    "n_inner": "mlp_width",
    "activation_function": "activation",
    "layer_norm_epsilon": "norm_eps",
}
"""What transformers' own models call fields of `ModelConfig`."""
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
# what transformers itself hands on, in one version or another
_HANDED_ON = {
    *("attn_implementation", "auto_map", "code_revision", "dtype", "model_type", "name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "torch_dtype"),
    *("gguf_file", "return_unused_kwargs", "trust_remote_code", "use_cache"),
}


def _head_width(fields: Mapping[str, Any]) -> int:
    return int(fields["head_dim"] or fields["d_model"] // fields["num_heads"])


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is known of this object only."""
    return {key: value for key, value in values.items() if key not in _PRIVATE}


def _field(ours: str) -> property:
    def read(self: PolyakConfig) -> Any:
        return self.polyak[ours]

    def write(self: PolyakConfig, value: Any) -> None:
        self.polyak[ours] = value
        if ours in AXES:  # named by whoever sets it, not by the folder
            self._from_data = False

    return property(read, write, doc=f"`ModelConfig.{ours}`.")


def _in_our_names(given: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Field of `ModelConfig` → (the name it was given under, its value)."""
    found: dict[str, tuple[str, Any]] = {}
    for name, value in given.items():
        ours = _NAMES.get(name, name)
        if ours == "activation":
            value = _ACTIVATIONS.get(value, value)
        other, before = found.setdefault(ours, (name, value))
        if before != value:
            raise ConfigError(f"{other}={before!r} and {name}={value!r} are one setting; give one")
    return found


def _check_known(names: Iterable[str]) -> None:
    plain = PretrainedConfig()
    known = [*_FIELDS, *_NAMES]
    for name in names:
        others = name in _HANDED_ON or name.startswith("_") or hasattr(plain, name)
        if name not in known and not others:
            raise unknown("setting of a polyak model", name, known)


NAMES = (*_FIELDS, *_NAMES)
"""What `from_pretrained` may be given to change a model's configuration."""


class PolyakConfig(PretrainedConfig):
    """The configuration of a model in the form of transformers.

    The architecture is one dictionary, `polyak`, the fields of `ModelConfig`. Names that
    transformers has of its own (`hidden_size`, `vocab_size`, …) read and write it, so the two
    cannot differ; they are written to `config.json` too, for other programs.

    Args:
        polyak: fields of `ModelConfig`.
        use_cache: whether a forward pass returns keys and values to go on with.
        **kwargs: single fields of `ModelConfig` (`rule="adam"`), which count before `polyak`, or
            the names that GPT-2 and Llama have for them (`num_hidden_layers=3`: as many layers);
            everything else goes to `PretrainedConfig`.

    Raises:
        UnknownNameError: `polyak` has a key that is no field, or nobody knows an argument; the
            nearest is offered.
        ConfigError: a standard name disagrees with the architecture, or two with each other.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # as in transformers

    rule = _field("rule")
    vocab_size = _field("vocab_size")
    hidden_size = _field("d_model")
    num_attention_heads = _field("num_heads")
    max_position_embeddings = _field("context_length")
    tie_word_embeddings = _field("tie_embeddings")

    def __init__(
        self, polyak: Mapping[str, Any] | None = None, use_cache: bool = True, **kwargs: Any
    ) -> None:
        check_keys(ModelConfig, polyak or (), "model setting")
        fields = {**ModelConfig().to_dict(), **(polyak or {})}
        # a whole config.json has the names that follow from its `polyak` part, and may have some
        # of another version of transformers
        whole = polyak is not None and "model_type" in kwargs
        head_dim = kwargs.pop("head_dim", None)  # a field, and written where it follows, too
        if whole:
            for name in _DERIVED:
                kwargs.pop(name, None)
        else:
            _check_known(kwargs)
        names = [name for name in (*_FIELDS, *_NAMES) if name in kwargs]
        given = _in_our_names({name: kwargs.pop(name) for name in dict.fromkeys(names)})
        for ours, (theirs, value) in given.items():
            if polyak is not None and theirs in _NAMES and value != fields[ours]:
                raise ConfigError(
                    f"{theirs}={value!r} disagrees with {ours}={fields[ours]!r} of the 'polyak' "
                    "part of this configuration; change both or neither"
                )
            fields[ours] = value
        if head_dim not in (None, _head_width(fields)):
            fields["head_dim"] = head_dim
        self.polyak, self.use_cache = fields, use_cache
        kwargs.setdefault("use_cache", True)
        # transformers 4 has it as an argument and would set its own default
        kwargs["tie_word_embeddings"] = fields["tie_embeddings"]
        super().__init__(**kwargs)
        # last, as `kwargs` may be anything that a file says
        self._from_data = False

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As everywhere in transformers; with `trust_remote_code=True`, code of the folder runs.

        Raises:
            TrustError: it brings code that was not made here, without that word.
        """
        with trusting(bool(kwargs.get("trust_remote_code"))):
            found = super().from_pretrained(name, **kwargs)
            config = found[0] if isinstance(found, tuple) else found
            config.name_or_path = os.fspath(name)
            if brings_code(config.polyak):
                config.model_config()
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save `config.json`, and with it the code of a rule of the user's own."""
        super().save_pretrained(save_directory, **kwargs)
        if brings_code(self.polyak):
            config, folder = self.model_config(), Path(save_directory)
            keep(folder, config, origins=False)
            written = read_json(folder / "config.json")
            write_json(folder / "config.json", {**written, "polyak": portable_values(config)})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a `config.json`, with overrides under our names or standard ones.

        Code that the file names is not run by this.

        Raises:
            UnknownNameError: nobody knows an override; the nearest is offered.
        """
        given = {n: kwargs.pop(n) for n in list(kwargs) if n in _FIELDS or n in _NAMES}
        ids = [n for n in kwargs if n in ("bos_token_id", "eos_token_id", "pad_token_id")]
        config_dict = {**config_dict, **{name: kwargs.pop(name) for name in ids}}
        if not kwargs.get("return_unused_kwargs"):  # else the caller looks after the rest
            _check_known(kwargs)
        changed: dict[str, Any] = {}
        if given:
            changed = {ours: value for ours, (_, value) in _in_our_names(given).items()}
            stale = {*_NAMES, "head_dim"}
            config_dict = {k: v for k, v in config_dict.items() if k not in stale}
            config_dict["polyak"] = {**config_dict.get("polyak", {}), **changed}
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config._from_data = not AXES.keys() & changed.keys()  # code that the caller names is theirs
        return found

    def model_config(self) -> ModelConfig:
        """The architecture, validated.

        Raises:
            PolyakError: a field cannot work, or the rule is not found here.
            TrustError: the rule is code that came with the folder, and there is no word for it.
        """
        if self._from_data and brings_code(self.polyak):
            self.polyak = opened(self._code_folder(), self.polyak)
            self._from_data = False
        try:
            return ModelConfig.from_dict(self.polyak)
        except (RuleError, AttentionError) as error:
            axis = "rule" if isinstance(error, RuleError) else "attention"
            raise type(error)(
                f"{error}; if it lies elsewhere on this machine, pass "
                f"{axis}='path/to/file.py:ClassName' to from_pretrained"
            ) from error

    def _code_folder(self) -> Path:
        """Where the code lies that came with this configuration; fetched from the hub, if need be.

        Fetching runs nothing, and happens after the user's word only.
        """
        name = str(self.name_or_path or ".")
        place = Path(name)
        if place.is_dir() or not is_trusted():
            return code_folder(place)
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=[f"{FOLDER}/*"]))

    @property
    def num_hidden_layers(self) -> int:
        """Calls of attention: transformers makes a key-value slot for each."""
        return int(standard_values(self.model_config())["num_hidden_layers"])

    @property
    def num_key_value_heads(self) -> int:
        """Heads of the keys and values to cache."""
        return int(self.polyak.get("num_kv_heads") or self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return _head_width({"head_dim": None, **self.polyak})

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the standard names."""
        return self._with_names(_plain(super().to_dict()))

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` gets: the architecture in full, other values where not default."""
        return self._with_names(_plain(super().to_diff_dict()))

    def _with_names(self, values: dict[str, Any]) -> dict[str, Any]:
        values |= {theirs: self.polyak[ours] for theirs, ours in STANDARD_NAMES.items()}
        try:
            config = self.model_config()
            values |= standard_values(config)
        except PolyakError:  # printing a configuration must work where its rule is not found
            return {**values, "polyak": dict(self.polyak)}
        auto_map = {auto: f"{STUB}.{name}" for auto, name in auto_classes(config).items()}
        return {**values, "auto_map": auto_map, "polyak": config.to_dict()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolyakConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: saved folders import this class from polyak, no source is copied to them."""
