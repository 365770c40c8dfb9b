"""Weights named as in the released checkpoints of arXiv:2605.24425, and back.

Our name                          released name
`embedding.tokens`                `tok_emb` (and `pos_emb`)
`streams.v.tokens`                `vel_tok_emb`; streams of another name: `m_tok_emb`
`blocks.0.attention.qkv`          `layers.0.attn.qkv_proj`
`blocks.0.rules.mlp.beta_raw`     `layers.0.beta_mlp_raw`
`blocks.0.rules.mlp.norm`         `layers.0.ln_v_mlp`, or `ln_update_mlp` for update norms
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyak.errors import ConfigError
from polyak.nn.presets import PAPER
from polyak.nn.rule_places import is_composite
from polyak.nn.transformer import Transformer

TIED_OUTPUT = "lm_head.weight"
"""The output matrix, which some checkpoints list besides the token table that it is tied to."""

_SUBSTEPS = {"attention": "attn", "mlp": "mlp"}
_ORACLES = {
    "attention.norm": "ln_attn",
    "attention.qkv": "attn.qkv_proj",
    "attention.out": "attn.out_proj",
    "mlp.norm": "ln_mlp",
    "mlp.up": "mlp.w1",
    "mlp.down": "mlp.w2",
}
_TABLES = {"tokens": "tok_emb", "positions": "pos_emb"}
_NORMS = {"state_norm": "ln_v", "update_norm": "ln_update"}


def released_names(model: Transformer) -> dict[str, str]:
    """Our parameter names → released names, in the model's order.

    Raises:
        ConfigError: the release has no such model (another backbone than the paper's, or another
            splitting).
    """
    config = model.config
    if is_composite(config.rule):
        raise ConfigError(
            f"the released checkpoints have one rule everywhere; this model has "
            f"{model.placement.name}"
        )
    own = {"norm_eps": config.norm_eps, "splitting": "lie_trotter"}
    released = {**PAPER, **own, "embedding_norm": "none", "embedding_reinjection": False}
    if config.stream_width != config.d_model:
        released["residual_width"] = None
    if config.stream_start == "x":
        released["stream_start"] = None
    if config.kv_heads == config.num_heads:
        released["num_kv_heads"] = config.num_kv_heads
    if config.heads_width == config.d_model:
        released["head_dim"] = config.head_dim
    if config.hidden_width == 4 * config.d_model:
        released["mlp_width"] = config.mlp_width
    if config.qkv_bias is False:
        released["qkv_bias"] = False
    for name, value in released.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"the released checkpoints have {name}={value!r}; this model differs, with "
                f"{name}={getattr(config, name)!r}"
            )
    if config.rule_options.get("coefficients") == "unconstrained":
        raise ConfigError(
            "the released checkpoints store scalars before sigmoid and softplus; this model has "
            "coefficients='unconstrained'"
        )
    names = {}
    for ours, _ in model.named_parameters():
        if ours != "head.weight":  # tied, so normally not listed
            names[ours] = _released_name(ours, model)
    return names


def _released_name(ours: str, model: Transformer) -> str:
    parts = ours.split(".")
    match parts:
        case ["embedding", table, "weight"]:
            return f"{_TABLES[table]}.weight"
        case ["streams", stream, table, "weight"]:
            return f"{'vel' if stream == 'v' else stream}_{_TABLES[table]}.weight"
        case ["norm", "weight"]:
            return "final_ln.weight"
        case ["blocks", layer, "rules", substep, name]:
            scalar = name.removesuffix("_raw").rstrip("_")
            return f"layers.{layer}.{scalar}_{_SUBSTEPS[substep]}_raw"
        case ["blocks", layer, "rules", substep, norm, "weight"]:
            kind = _NORMS[model.placement.only.norms[norm].option]
            return f"layers.{layer}.{kind}_{_SUBSTEPS[substep]}.weight"
        case ["blocks", layer, oracle, part, "weight"]:
            return f"layers.{layer}.{_ORACLES[f'{oracle}.{part}']}.weight"
    raise ConfigError(f"parameter {ours!r} has no counterpart in the released checkpoints")


def load_state_dict(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Load weights named as in a released checkpoint into `model`, in place.

    Raises:
        ConfigError: a weight is missing, left over, or has another shape; the first is named. Or
            the output is not tied.
    """
    names = released_names(model)
    missing = [released for released in names.values() if released not in state]
    extra = sorted(set(state) - set(names.values()) - {TIED_OUTPUT})
    if missing or extra:
        raise ConfigError(
            f"not a checkpoint of rule {model.placement.name}: "
            + "; ".join(
                f"{what} {', '.join(found[:3])}{' …' if len(found) > 3 else ''}"
                for what, found in (("missing", missing), ("unexpected", extra))
                if found
            )
        )
    tied = state.get(TIED_OUTPUT)
    if tied is not None and not torch.equal(tied, state["tok_emb.weight"]):
        raise ConfigError(
            f"{TIED_OUTPUT} is not tok_emb.weight: the output is untied, which no release has"
        )
    parameters = dict(model.named_parameters())
    for ours, released in names.items():
        if parameters[ours].shape != state[released].shape:
            raise ConfigError(
                f"{released} has shape {tuple(state[released].shape)}, the model needs "
                f"{tuple(parameters[ours].shape)}"
            )
    with torch.no_grad():
        for ours, released in names.items():
            parameters[ours].copy_(state[released])


def to_state_dict(model: Transformer) -> dict[str, Tensor]:
    """The model's weights under their released names (detached, not copied)."""
    parameters = dict(model.named_parameters())
    return {released: parameters[ours].detach() for ours, released in released_names(model).items()}
