"""Models in Hugging Face's format: GPT-2, the Llama family, and polyak's own that were shared.

A folder, or a name on the hub:

config.json
model.safetensors, or its shards with model.safetensors.index.json
pytorch_model.bin (and its shards), read without running code; safetensors win
tokenizer.json, or vocab.json and merges.txt
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.errors import PolyakError, RunError, shown_value
from polyak.files import read_json
from polyak.interop.safe_pickle import load_pickle
from polyak.interop.weights import (
    LLAMA_FAMILY,
    from_gpt2,
    from_llama,
    from_own,
    gpt2_config,
    llama_config,
)
from polyak.nn.config import ModelConfig
from polyak.nn.pieces import opened
from polyak.nn.transformer import Transformer
from polyak.reading import fields, file_name, mapping_of
from polyak.training.runs.folder import read_weights
from polyak.training.runs.model_files import MODEL_TYPE, check_weights

WANTED = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "weights.json",
    "code/*",
)
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_PATIENCE = 10.0


def load(folder: Path) -> tuple[Transformer, dict[str, Any]]:
    """The model in a folder, in evaluation mode, float32, and its `config.json`.

    Raises:
        RunError: no such model, or a file of it is missing or damaged.
        ConfigError: it computes something that polyak's models do not; the setting is named.
    """
    if (folder / "run.json").exists():
        raise RunError(f"{folder} is a run of polyak already; use it as it is")
    described = read_json(folder / "config.json")
    kind = described.get("model_type") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in _READERS:
        raise RunError(
            f"{folder} holds a model of type {shown_value(kind)}; what can be imported: "
            f"{', '.join(_READERS)}"
        )
    read_config, repack = _READERS[kind]
    try:
        if kind == MODEL_TYPE:
            check_weights(folder)
            described = {**described, "polyak": opened(folder, described["polyak"])}
        config = read_config(described)
    except PolyakError:  # some are KeyErrors or ValueErrors, too
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise RunError(f"{folder / 'config.json'} is not whole: {error!r}") from error
    state = read_state(folder)
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"{folder}: weight {name!r} is not finite everywhere")
    ours = repack(state, config)
    model = Transformer(config)  # once weights are known to have its size, whatever that says
    model.load_state_dict(ours)
    return model.float().eval(), described


def _own_config(described: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(described["polyak"])


_READERS: dict[str, tuple[Callable[..., ModelConfig], Callable[..., dict[str, Tensor]]]] = {
    MODEL_TYPE: (_own_config, from_own),
    "gpt2": (gpt2_config, from_gpt2),
    **dict.fromkeys(LLAMA_FAMILY, (llama_config, from_llama)),
}
"""By `model_type`: what reads `config.json`, and what renames the weights."""


def read_state(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder under their names there.

    Raises:
        RunError: there are none, a shard is missing, or a file is damaged.
    """
    file = _first(folder)
    return _shards(folder, file) if file.suffix == ".json" else _file(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that `read_state` reads, for the record."""
    file = _first(folder)
    if file.suffix != ".json":
        return [file]
    return [
        file,
        *(folder / shard for shard in sorted(set(_places(file).values()))),
    ]


def _first(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.is_file():
                return file
    raise RunError(
        f"{folder} holds no weights: no model.safetensors, no pytorch_model.bin, and no shards"
    )


def _shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = _places(index)
    state: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not (folder / shard).is_file():
            raise RunError(f"{folder / shard} is missing, one of the shards in {index.name}")
        state |= _file(folder / shard)
    if missing := sorted(places.keys() - state.keys()):
        raise RunError(f"{index} promises weight {missing[0]!r}, which no shard holds")
    return state


def _places(index: Path) -> dict[str, str]:
    """Weight → the shard that holds it, a file beside the index."""
    content = fields(read_json(index), str(index), {"weight_map": mapping_of(file_name)})
    if not content["weight_map"]:
        raise RunError(f"{index} is not an index of shards: its 'weight_map' is empty")
    places: dict[str, str] = content["weight_map"]
    return places


def _file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_weights(file)
    content = load_pickle(file)
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise RunError(f"{file} holds something else than weights")
    return dict(content)


def fetch(name: str) -> Path:
    """The folder of a model on the hub, from the cache or else downloaded.

    Raises:
        RunError: it is not in the cache and the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, timeout=_PATIENCE)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        safe = any(file.endswith(".safetensors") for file in files)
        wanted = [*WANTED] if safe else [*WANTED, *PICKLES]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as problem:  # the layers below have error classes of their own
        cached = _cached(name)
        if cached is not None:
            return cached
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise RunError(
            f"{name} is no file or folder here, it is not in Hugging Face's cache, and the hub "
            f"does not give it: {reason}; download it where there is a network "
            f"('hf download {name} --local-dir FOLDER') and import the folder"
        ) from problem


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*WANTED], local_files_only=True))
    except Exception:
        return None
    return folder if (folder / "config.json").is_file() else None


def described_dtype(described: Mapping[str, Any]) -> str:
    """The number format that the configuration states, for the record."""
    return json.dumps(described.get("dtype", described.get("torch_dtype"))).strip('"')
