"""Weights of GPT-2 and of the Llama family, under their names in transformers, as ours.

`llama_config` and `gpt2_config` read a model's `config.json`; `from_llama` and `from_gpt2` rename
and repack its weights for `Transformer(config).load_state_dict`, of a gradient_descent model that
then computes the same logits. Imports no transformers: dictionaries go in and out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.errors import ConfigError, unknown
from polyak.nn.config import ModelConfig

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` that `llama_config` reads."""

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS |= {"silu": "silu", "swish": "silu", "relu": "relu"}


def gpt2_config(config: Mapping[str, Any], **fields: Any) -> ModelConfig:
    """The `gpt2` preset at the shape of a GPT-2 `config.json`; fields given win.

    Raises:
        ConfigError: the model has what ours has not; the setting is named.
    """
    _must(config, "model_type", "gpt2", "gpt2")
    _must(config, "scale_attn_weights", True, True)
    _must(config, "scale_attn_by_inverse_layer_idx", False, False)
    _must(config, "add_cross_attention", False, False)
    inner = config.get("n_inner")
    values: dict[str, Any] = {
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "d_model": config["n_embd"],
        "vocab_size": config["vocab_size"],
        "context_length": config.get("n_positions", 1024),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(config, "activation_function", "gelu_new"),
        "mlp_width": None if inner in (None, 4 * config["n_embd"]) else inner,
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }
    return ModelConfig.preset("gpt2", **{**values, **fields})


def llama_config(config: Mapping[str, Any], **fields: Any) -> ModelConfig:
    """The `llama` preset at the shape of a Llama, Mistral or Qwen `config.json`; fields given win.

    Raises:
        ConfigError: the model has what ours has not; the setting is named.
    """
    kind = config.get("model_type", "llama")
    if kind not in LLAMA_FAMILY:
        raise unknown("model_type", str(kind), LLAMA_FAMILY)
    context = config["max_position_embeddings"]
    window = config.get("sliding_window")
    if config.get("use_sliding_window", kind == "mistral") and window is not None:
        context = min(context, window)  # up to there, the window hides nothing
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim")
    bias = bool(config.get("attention_bias", False))
    if bias != bool(config.get("mlp_bias", False)):
        raise ConfigError(
            "attention_bias and mlp_bias differ in this model; polyak has biases in all matrices, "
            "in none, or in queries, keys and values only"
        )
    values: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "d_model": width,
        "head_dim": None if head_dim in (None, width // heads) else head_dim,
        "mlp_width": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "context_length": context,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        **_rope(config),
        "activation": _activation(config, "hidden_act", "silu"),
        "bias": bias,
        "qkv_bias": True if kind == "qwen2" else None,
        "qk_norm": kind == "qwen3",
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }
    return ModelConfig.preset("llama", **{**values, **fields})


def from_gpt2(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A `GPT2LMHeadModel`'s (or `GPT2Model`'s) weights as ours.

    transformers keeps GPT-2's matrices transposed, as OpenAI released them.

    Raises:
        ConfigError: a weight is missing, left over or of another shape; the first is named.
    """
    take = _Taker(state, "transformer.")
    ours = {
        "embedding.tokens.weight": take("wte.weight"),
        "embedding.positions.weight": take("wpe.weight"),
        **take.affine("norm", "ln_f"),
    }
    for layer in range(config.num_layers):
        block, theirs = f"blocks.{layer}", f"h.{layer}"
        for name, source in (("attention.norm", "ln_1"), ("mlp.norm", "ln_2")):
            ours |= take.affine(f"{block}.{name}", f"{theirs}.{source}")
        for name, source in (
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            part = take.affine(f"{block}.{name}", f"{theirs}.{source}")
            part[f"{block}.{name}.weight"] = part[f"{block}.{name}.weight"].t().contiguous()
            ours |= part
    buffers = [f"h.{i}.attn.{name}" for i in range(config.num_layers) for name in _GPT2_BUFFERS]
    return _finish(ours, take, config, buffers)


_GPT2_BUFFERS = ("bias", "masked_bias")  # the causal mask, in older files


def from_llama(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A Llama's, Mistral's or Qwen's weights as ours: queries, keys and values in one matrix.

    Raises:
        ConfigError: a weight is missing, left over or of another shape; the first is named.
    """
    take = _Taker(state, "model.")
    ours = {
        "embedding.tokens.weight": take("embed_tokens.weight"),
        "norm.weight": take("norm.weight"),
    }
    qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
    for layer in range(config.num_layers):
        block, theirs = f"blocks.{layer}", f"layers.{layer}"
        ours[f"{block}.attention.norm.weight"] = take(f"{theirs}.input_layernorm.weight")
        ours[f"{block}.mlp.norm.weight"] = take(f"{theirs}.post_attention_layernorm.weight")
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                ours[f"{block}.attention.{name}.weight"] = take(f"{theirs}.self_attn.{name}.weight")
        for kind in ("weight", "bias"):
            if kind == "weight" or qkv_bias:
                ours[f"{block}.attention.qkv.{kind}"] = torch.cat(
                    [take(f"{theirs}.self_attn.{part}_proj.{kind}") for part in "qkv"]
                )
            if kind == "weight" or config.bias:
                ours[f"{block}.attention.out.{kind}"] = take(f"{theirs}.self_attn.o_proj.{kind}")
                for part in ("gate", "up", "down"):
                    ours[f"{block}.mlp.{part}.{kind}"] = take(f"{theirs}.mlp.{part}_proj.{kind}")
    buffers = [f"layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers)]
    return _finish(ours, take, config, [*buffers, "rotary_emb.inv_freq"])


def from_own(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A shared polyak model's weights: named as here; a tied output may be left out.

    Raises:
        ConfigError: a weight is missing, left over or of another shape; the first is named.
    """
    renamed = {"head.weight": "lm_head.weight"}
    take = _Taker({renamed.get(name, name): tensor for name, tensor in state.items()}, "")
    names = [name for name in _shapes(config, rules=True) if name != "head.weight"]
    return _finish({name: take(name) for name in names}, take, config, [], rules=True)


class _Taker:
    """Takes weights by name, with or without a prefix, and knows which are left."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        self.left = set(self.state)

    def __call__(self, name: str) -> Tensor:
        if name not in self.state:
            raise ConfigError(f"weight {name!r} is missing; is this another kind of model?")
        self.left.discard(name)
        return self.state[name]

    def affine(self, ours: str, theirs: str) -> dict[str, Tensor]:
        return {f"{ours}.{kind}": self(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def _finish(
    ours: dict[str, Tensor],
    take: _Taker,
    config: ModelConfig,
    buffers: list[str],
    *,
    rules: bool = False,
) -> dict[str, Tensor]:
    """With the output matrix; every weight taken, and of the shape that the model has."""
    take.left -= set(buffers)
    tokens = ours["embedding.tokens.weight"]
    if config.tie_embeddings:
        take.left.discard("lm_head.weight")
        output = take.state.get("lm_head.weight", tokens)
        if output is not tokens and not torch.equal(output, tokens):
            raise ConfigError(
                "lm_head.weight differs from the token table; give tie_embeddings=False"
            )
        ours["head.weight"] = tokens
    else:
        # a tied file has no output matrix of its own
        has_own = "lm_head.weight" in take.state
        ours["head.weight"] = take("lm_head.weight") if has_own else tokens.clone()
    if take.left:
        raise ConfigError(f"weight {min(take.left)!r} has no counterpart in a model of {config}")
    for name, shape in _shapes(config, rules=rules).items():
        if name not in ours or ours[name].shape != shape:
            found = tuple(ours[name].shape) if name in ours else "missing"
            raise ConfigError(f"weight {name} needs shape {tuple(shape)}, and is {found}")
    return ours


def _shapes(config: ModelConfig, *, rules: bool) -> dict[str, torch.Size]:
    """Of all weights, by name; `rules`: those too that an update rule learns of its own."""
    from polyak.nn.transformer import Transformer

    with torch.device("meta"):
        state = Transformer(config).state_dict()
    own = () if rules else ("streams.", ".rules.")
    return {name: t.shape for name, t in state.items() if not any(part in name for part in own)}


LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope: Mapping[str, Any] = {
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", config.get("rope_theta") or 10000.0))
    if kind == "llama3":
        missing = [name for name in LLAMA3 if name not in rope]
        if missing:
            raise ConfigError(f"rope_scaling of type llama3 has no {missing[0]!r}")
        return {"rope_theta": theta, "rope_scaling": tuple(rope[name] for name in LLAMA3)}
    if kind == "linear" and "factor" in rope:
        return {"rope_theta": theta, "rope_scaling": (rope["factor"],)}
    if kind != "default":
        raise ConfigError(
            f"the model stretches its rotary positions (rope_type={kind!r}), which polyak does not"
        )
    return {"rope_theta": theta}


def _activation(config: Mapping[str, Any], name: str, default: str) -> str:
    value = config.get(name, default)
    if value not in _ACTIVATIONS:
        raise unknown(name, str(value), _ACTIVATIONS)
    return _ACTIVATIONS[value]


def _must(config: Mapping[str, Any], name: str, value: Any, default: Any) -> None:
    found = config.get(name, default)
    if found is not None and found != value:
        raise ConfigError(f"the model has {name}={found!r}; polyak's has {value!r} only")
