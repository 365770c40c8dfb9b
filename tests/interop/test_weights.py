"""GPT-2's and the Llama family's weights: the same logits as transformers' own models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyak import ModelConfig, Transformer
from polyak.errors import ConfigError, PolyakError
from polyak.interop import weights
from polyak.nn.cache import KeyValueCache

transformers = pytest.importorskip("transformers")
IDS = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(0))

GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 37, "n_positions": 16}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 72,
    "vocab_size": 37,
    "max_position_embeddings": 16,
}
Read = Callable[..., ModelConfig]
Repack = Callable[..., dict[str, Tensor]]
MODELS: dict[str, tuple[str, dict[str, Any], Read, Repack]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, weights.gpt2_config, weights.from_gpt2),
    "gpt2 of another width": (
        "GPT2LMHeadModel",
        {**GPT2, "n_inner": 40, "activation_function": "relu"},
        weights.gpt2_config,
        weights.from_gpt2,
    ),
    "llama": ("LlamaForCausalLM", LLAMA, weights.llama_config, weights.from_llama),
    "llama, tied, with biases": (
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        weights.llama_config,
        weights.from_llama,
    ),
    "llama with all heads": (
        "LlamaForCausalLM",
        {**LLAMA, "num_key_value_heads": 4, "rope_parameters": {"rope_theta": 500000.0}},
        weights.llama_config,
        weights.from_llama,
    ),
    "llama 3.1": (
        "LlamaForCausalLM",
        {
            **LLAMA,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 16,
            },
        },
        weights.llama_config,
        weights.from_llama,
    ),
    "llama, interpolated": (
        "LlamaForCausalLM",
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
        weights.llama_config,
        weights.from_llama,
    ),
    "mistral": ("MistralForCausalLM", LLAMA, weights.llama_config, weights.from_llama),
    "qwen2": ("Qwen2ForCausalLM", LLAMA, weights.llama_config, weights.from_llama),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**LLAMA, "head_dim": 16},
        weights.llama_config,
        weights.from_llama,
    ),
}


def theirs_and_ours(name: str) -> tuple[nn.Module, Transformer]:
    """A model with weights far from their start, and ours with the same."""
    kind, shape, read, repack = MODELS[name]
    made = getattr(transformers, kind)
    theirs = made(made.config_class(**shape)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = read(theirs.config.to_dict())
    ours = Transformer(config).eval()
    ours.load_state_dict(repack(theirs.state_dict(), config))
    return theirs, ours


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str) -> None:
    theirs, ours = theirs_and_ours(name)
    expected = theirs(IDS).logits
    assert expected.abs().max() > 1
    assert (ours(IDS) - expected).abs().max() < 1e-5
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = theirs(IDS, attention_mask=mask, position_ids=positions).logits
    found = ours(IDS, attention_mask=mask)
    assert (found - expected)[mask.bool()].abs().max() < 1e-5
    cache = KeyValueCache(16)
    pieces = [ours(IDS[:, :4], attention_mask=mask[:, :4], cache=cache)]
    for end in range(5, 13):
        pieces.append(ours(IDS[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache))
    assert (torch.cat(pieces, 1) - expected)[mask.bool()].abs().max() < 1e-5


def test_an_imported_model_is_its_preset_at_another_shape() -> None:
    gpt2 = weights.gpt2_config({**GPT2, "model_type": "gpt2"})
    shape = {name: getattr(gpt2, name) for name in ("num_layers", "num_heads", "d_model")}
    sizes = {"vocab_size": 37, "context_length": 16}
    assert gpt2 == ModelConfig.preset("gpt2", **shape, **sizes)
    llama = weights.llama_config({**LLAMA, "rms_norm_eps": 1e-5})
    assert llama == ModelConfig.preset(
        "llama", **{**shape, "d_model": 32, "num_kv_heads": 2, "mlp_width": 72, **sizes}
    )


def test_a_base_model_without_its_head_serves_too() -> None:
    theirs, ours = theirs_and_ours("gpt2")
    again = weights.from_gpt2(theirs.transformer.state_dict(), ours.config)
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.state_dict().items())


REFUSED: list[tuple[Read, dict[str, Any], str]] = [
    (weights.llama_config, {"model_type": "llava"}, "unknown model_type 'llava'"),
    (
        weights.llama_config,
        {**LLAMA, "rope_scaling": {"rope_type": "yarn"}},
        "rotary positions .rope_type='yarn'.",
    ),
    (weights.llama_config, {**LLAMA, "hidden_act": "geglu"}, "unknown hidden_act 'geglu'"),
    (weights.llama_config, {**LLAMA, "mlp_bias": True}, "attention_bias and mlp_bias differ"),
    (weights.gpt2_config, {**GPT2, "scale_attn_weights": False}, "scale_attn_weights=False"),
]


@pytest.mark.parametrize(("read", "config", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_a_model_that_is_not_ours_is_refused(
    read: Read, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolyakError, match=message) as caught:
        read(config)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused() -> None:
    theirs, ours = theirs_and_ours("llama")
    state, config = theirs.state_dict(), ours.config
    with pytest.raises(ConfigError, match=r"'layers\.1\.extra' has no counterpart"):
        weights.from_llama({**state, "model.layers.1.extra": IDS}, config)
    with pytest.raises(ConfigError, match=r"weight 'norm\.weight' is missing"):
        weights.from_llama({k: v for k, v in state.items() if k != "model.norm.weight"}, config)
    with pytest.raises(ConfigError, match=r"norm\.weight needs shape \(32,\), and is \(3,\)"):
        weights.from_llama({**state, "model.norm.weight": torch.ones(3)}, config)
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from the token table"):
        weights.from_llama(
            state, ModelConfig.from_dict({**config.to_dict(), "tie_embeddings": True})
        )
