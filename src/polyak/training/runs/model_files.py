"""What Hugging Face's Auto classes read in a `model/` folder beside weights and tokenizer.

config.json             what the model is: our part under `polyak`, and the names others look for
modeling_polyak.py      imports the installed package, for `trust_remote_code=True`
generation_config.json  the special ids
tokenizer_config.json   how `tokenizer.json` is to be used
weights.json            SHA-256 of the weights, which loading checks
code/                   a user's own rule, see `polyak.nn.pieces`

Written without transformers, which a training machine need not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.errors import RunError
from polyak.files import read_json, sha256_of, write_atomic, write_json

if TYPE_CHECKING:
    from polyak.data.tokenizers import Tokenizer
    from polyak.nn.config import ModelConfig

MODEL_TYPE = "polyak"
STUB = "modeling_polyak"
"""Name of the module in the folder that `auto_map` points to."""

STANDARD_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tie_embeddings",
}
"""What transformers calls fields of `ModelConfig`."""

_STUB_TEXT = '''"""Loads this model with `trust_remote_code=True`, from the package polyak.

    pip install "polyak[hf]"
"""

from polyak.interop.huggingface import PolyakConfig, PolyakForCausalLM, PolyakForMaskedLM

__all__ = ["PolyakConfig", "PolyakForCausalLM", "PolyakForMaskedLM"]
'''


def attention_calls(config: ModelConfig) -> int:
    """Calls of attention in a forward pass, each of which has its own keys and values to cache.

    Raises:
        PolyakError: the rule is not there, or its step fails when run to count them.
    """
    from polyak.nn.placement import placement_of

    placement = placement_of(config)
    calls = {id(placed): placed.step_cost(config).oracle_calls for placed in placement.parts}
    return sum(calls[id(placed)] for substep, placed in placement.steps() if substep != "mlp")


def auto_classes(config: ModelConfig) -> dict[str, str]:
    """Auto class → our class, for `auto_map`: a language model, or an encoder if not causal."""
    model = "CausalLM" if config.causal else "MaskedLM"
    return {"AutoConfig": "PolyakConfig", f"AutoModelFor{model}": f"PolyakFor{model}"}


def standard_values(config: ModelConfig) -> dict[str, Any]:
    """The configuration under the names that transformers and its caches look for.

    `num_hidden_layers` is the number of key-value slots, as caches are built from it.
    """
    return {
        **{theirs: getattr(config, ours) for theirs, ours in STANDARD_NAMES.items()},
        "num_hidden_layers": attention_calls(config),
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_width,
    }


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The end of text ends and pads, and begins a text where the tokenizer has no other token."""
    end = tokenizer.end_of_text
    return {"bos_token_id": (*tokenizer.prefix, end)[0], "eos_token_id": end, "pad_token_id": end}


def hugging_face_config(
    config: ModelConfig, tokenizer: Tokenizer | None, dtype: str = "float32"
) -> dict[str, Any]:
    """The content of `config.json`."""
    from polyak.nn.pieces import portable_values

    classes = auto_classes(config)
    return {
        "model_type": MODEL_TYPE,
        "architectures": [name for auto, name in classes.items() if auto != "AutoConfig"],
        "auto_map": {auto: f"{STUB}.{name}" for auto, name in classes.items()},
        "dtype": dtype,
        **(special_ids(tokenizer) if tokenizer is not None else {}),
        **standard_values(config),
        "polyak": portable_values(config),
    }


def tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer_config.json`.

    `split_special_tokens`: text that spells `<|endoftext|>` is text, as in polyak's own tokenizer.
    In one that came with a model (`kind` kept) it is the token, as where it came from.
    Padding is on the left, where generation needs it.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.begin_token,
        "eos_token": tokenizer.end_token,
        "pad_token": tokenizer.end_token,
        "split_special_tokens": tokenizer.kind != "kept",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.context_length,
        **({"chat_template": chat} if (chat := tokenizer.chat_template) is not None else {}),
    }


def write_stub(folder: Path) -> None:
    """Write the module that `auto_map` points to.

    Raises:
        UnwritableError: the folder cannot be written.
    """
    write_atomic(folder / f"{STUB}.py", _STUB_TEXT)


def write_model_files(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, dtype: str = "float32"
) -> None:
    """Write all of these files; weights, their hash and `tokenizer.json` are written by others.

    Raises:
        UnwritableError: the folder cannot be written.
    """
    from polyak.nn.pieces import keep

    keep(folder, config, origins=False)
    write_stub(folder)
    write_json(folder / "tokenizer_config.json", tokenizer_config(config, tokenizer))
    if config.causal:
        write_json(folder / "generation_config.json", special_ids(tokenizer))
    write_json(folder / "config.json", hugging_face_config(config, tokenizer, dtype))


WEIGHTS_FILE = "weights.json"


def write_weights_hash(folder: Path) -> None:
    """Record the SHA-256 of a folder's weights.

    Raises:
        UnwritableError: the folder cannot be written.
    """
    files = {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}
    write_json(folder / WEIGHTS_FILE, {"sha256": files})


def check_weights(folder: Path) -> None:
    """Check that a folder's weights are those that were written with them; older ones have no hash.

    Raises:
        RunError: a file is another one.
    """
    file = folder / WEIGHTS_FILE
    if not file.exists():
        return
    content = read_json(file)
    recorded = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(recorded, dict):
        raise RunError(f"{file} is not a list of hashes: it has no 'sha256'")
    for name, sha256 in recorded.items():
        weights = folder / name
        if weights.parent != folder:
            raise RunError(f"{file}: {name!r} is not a file of this folder")
        if weights.is_file() and sha256_of(weights) != sha256:
            raise RunError(
                f"{weights} is not the file that was written here: its SHA-256 is another than in "
                f"{file.name}; copy it again, or remove {file.name} if it was changed on purpose"
            )
