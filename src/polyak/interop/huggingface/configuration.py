"""`PolyakConfig`: a `ModelConfig` as transformers wants it."""

# mypy: disable-error-code="override,no-untyped-call,misc,unused-ignore"
# (signatures of transformers differ between its versions, and some have no types)

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from polyak.errors import ConfigError, PolyakError, RuleError
from polyak.nn.config import ModelConfig
from polyak.settings import check_keys
from polyak.training.runs.model_files import (
    MODEL_TYPE,
    STANDARD_NAMES,
    STUB,
    auto_classes,
    standard_values,
)

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_DERIVED = ("num_hidden_layers", "num_key_value_heads")


def _head_width(fields: Mapping[str, Any]) -> int:
    return int(fields["head_dim"] or fields["d_model"] // fields["num_heads"])


def _field(ours: str) -> property:
    def read(self: PolyakConfig) -> Any:
        return self.polyak[ours]

    def write(self: PolyakConfig, value: Any) -> None:
        self.polyak[ours] = value

    return property(read, write, doc=f"`ModelConfig.{ours}`.")


class PolyakConfig(PretrainedConfig):
    """The configuration of a model in the form of transformers.

    The architecture is one dictionary, `polyak`, the fields of `ModelConfig`. Names that
    transformers has of its own (`hidden_size`, `vocab_size`, …) read and write it, so the two
    cannot differ; they are written to `config.json` too, for other programs.

    Args:
        polyak: fields of `ModelConfig`.
        use_cache: whether a forward pass returns keys and values to go on with.
        **kwargs: single fields of `ModelConfig` (`rule="adam"`), which count before `polyak`;
            everything else goes to `PretrainedConfig`.

    Raises:
        UnknownNameError: `polyak` has a key that is no field; the nearest is offered.
        ConfigError: a standard name disagrees with the architecture.
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
        head_dim = kwargs.pop("head_dim", None)  # a field, and written where it follows, too
        fields |= {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        for theirs, ours in STANDARD_NAMES.items():
            value = kwargs.pop(theirs, fields[ours])
            if polyak is None:
                fields[ours] = value
            elif value != fields[ours]:
                raise ConfigError(
                    f"{theirs}={value!r} disagrees with {ours}={fields[ours]!r} of the 'polyak' "
                    "part of this configuration; change both or neither"
                )
        if head_dim not in (None, _head_width(fields)):
            fields["head_dim"] = head_dim
        for name in _DERIVED:  # they follow from the fields
            kwargs.pop(name, None)
        self.polyak, self.use_cache = fields, use_cache
        kwargs.setdefault("use_cache", True)
        # transformers 4 has it as an argument and would set its own default
        kwargs["tie_word_embeddings"] = fields["tie_embeddings"]
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The architecture, validated.

        Raises:
            PolyakError: a field cannot work, or the rule is not found here.
        """
        try:
            return ModelConfig.from_dict(self.polyak)
        except RuleError as error:
            raise RuleError(
                f"{error}; if it lies elsewhere on this machine, pass "
                "rule='path/to/file.py:ClassName' to from_pretrained"
            ) from error

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
        return self._with_names(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """What `config.json` gets: the architecture in full, other values where not default."""
        return self._with_names(super().to_diff_dict())

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
