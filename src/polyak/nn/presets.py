"""Presets: whole backbones by name, as `ModelConfig` fields. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

from polyak.errors import unknown

Preset = Literal["paper", "gpt2", "llama", "momentum_transformer"]

PAPER: dict[str, Any] = {
    "attention": "softmax",
    "positions": "learned",
    "position_mix": "added",
    "rope_theta": 10000.0,
    "norm": "layer",
    "norm_eps": 1e-5,
    "norm_position": "pre",
    "mlp": "plain",
    "mlp_width": None,
    "activation": "gelu",
    "num_kv_heads": None,
    "head_dim": None,
    "qk_norm": False,
    "bias": False,
    "qkv_bias": None,
    "tie_embeddings": True,
}
"""The released models of arXiv:2605.24425, and the defaults: every field that a preset sets."""

GPT2: dict[str, Any] = {**PAPER, "activation": "gelu_tanh", "bias": True}
"""OpenAI's GPT-2."""

LLAMA: dict[str, Any] = {
    **PAPER,
    "positions": "rope",
    "norm": "rms",
    "mlp": "gated",
    "activation": "silu",
    "tie_embeddings": False,
}
"""Llama: and grouped-query attention, see `preset_fields`."""


MOMENTUM_TRANSFORMER: dict[str, Any] = {
    **PAPER,
    "attention": "momentum",
    "positions": "sinusoidal",
    "position_mix": "concatenated",
    "norm_position": "post",
    "activation": "relu",
    "bias": True,
    "tie_embeddings": False,
}
"""The backbone of arXiv:2208.00579's copy task and images; its coefficients are the task's."""

RULES = {"momentum_transformer": "residual_momentum@attention+gradient_descent@mlp"}
"""The rule of a preset that has one, where none is named beside it."""

_FIXED = {"paper": PAPER, "gpt2": GPT2, "momentum_transformer": MOMENTUM_TRANSFORMER}


def preset_fields(name: str, num_heads: int) -> dict[str, Any]:
    """The fields that a preset sets, for a model of so many heads.

    `llama` lets four heads share their keys and values, as Llama 3 does: `num_kv_heads` is the
    largest divisor of `num_heads` that is at most a quarter of it, or 1.

    Raises:
        UnknownNameError: there is no such preset; the nearest is offered.
    """
    if name not in get_args(Preset):
        raise unknown("preset", str(name), get_args(Preset))
    if name == "llama":
        groups = [n for n in range(1, num_heads // 4 + 1) if num_heads % n == 0]
        return {**LLAMA, "num_kv_heads": max(groups, default=1)}
    return dict(_FIXED[name])
