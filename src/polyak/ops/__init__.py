"""Numerics shared by rules, attention and optimizers: a plain reference beside every fast form.

`reference_forms()` makes every op use its plain equation instead of its fast form; both agree in
value and gradient.
"""

from __future__ import annotations

from polyak.ops.attention.adaptation_loop import MOST as LARGEST_MU
from polyak.ops.attention.adaptive import (
    adaptive_momentum_attention,
    adaptive_momentum_attention_recurrent,
    adaptive_momentum_attention_step,
    adaptive_momentum_attention_with_state,
)
from polyak.ops.attention.feature_maps import FEATURE_MAPS
from polyak.ops.attention.linear import (
    linear_attention,
    linear_attention_recurrent,
    linear_attention_step,
    linear_attention_with_state,
)
from polyak.ops.attention.momentum import (
    momentum_attention,
    momentum_attention_recurrent,
    momentum_attention_step,
    momentum_attention_with_state,
)
from polyak.ops.attention.options import AttentionOptions, AttentionState
from polyak.ops.gram import gram_ema, gram_ema_flops
from polyak.ops.inverse_sqrt import inverse_sqrt_apply, inverse_sqrt_apply_flops
from polyak.ops.linear_cross_entropy import linear_cross_entropy
from polyak.ops.moments import ema, ema_square, rms_scale
from polyak.ops.momentum import axpby, axpy, axpy_through, scaled_norm_add
from polyak.ops.momentum_norm import momentum_norm, numbers_serve
from polyak.ops.newton_schulz import newton_schulz, newton_schulz_flops
from polyak.ops.norms import layer_norm
from polyak.ops.orthogonal import orthogonalize
from polyak.ops.pairs import PAIRS, Pair
from polyak.ops.reference import (
    axpby_reference,
    axpy_reference,
    ema_reference,
    ema_square_reference,
    gram_ema_reference,
    inverse_sqrt_apply_reference,
    layer_norm_reference,
    linear_cross_entropy_reference,
    momentum_norm_reference,
    momentum_rms_norm_reference,
    newton_schulz_reference,
    orthogonalize_reference,
    reference_forms,
    rms_norm_reference,
    rms_scale_reference,
    scaled_norm_add_reference,
    using_reference_forms,
)
from polyak.ops.rms_norm import momentum_rms_norm, rms_norm

__all__ = [
    "FEATURE_MAPS",
    "LARGEST_MU",
    "PAIRS",
    "AttentionOptions",
    "AttentionState",
    "Pair",
    "adaptive_momentum_attention",
    "adaptive_momentum_attention_recurrent",
    "adaptive_momentum_attention_step",
    "adaptive_momentum_attention_with_state",
    "axpby",
    "axpby_reference",
    "axpy",
    "axpy_reference",
    "axpy_through",
    "ema",
    "ema_reference",
    "ema_square",
    "ema_square_reference",
    "gram_ema",
    "gram_ema_flops",
    "gram_ema_reference",
    "inverse_sqrt_apply",
    "inverse_sqrt_apply_flops",
    "inverse_sqrt_apply_reference",
    "layer_norm",
    "layer_norm_reference",
    "linear_attention",
    "linear_attention_recurrent",
    "linear_attention_step",
    "linear_attention_with_state",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "momentum_attention",
    "momentum_attention_recurrent",
    "momentum_attention_step",
    "momentum_attention_with_state",
    "momentum_norm",
    "momentum_norm_reference",
    "momentum_rms_norm",
    "momentum_rms_norm_reference",
    "newton_schulz",
    "newton_schulz_flops",
    "newton_schulz_reference",
    "numbers_serve",
    "orthogonalize",
    "orthogonalize_reference",
    "reference_forms",
    "rms_norm",
    "rms_norm_reference",
    "rms_scale",
    "rms_scale_reference",
    "scaled_norm_add",
    "scaled_norm_add_reference",
    "using_reference_forms",
]
