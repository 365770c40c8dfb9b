"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236), causal and not."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from polyak.ops.attention.bidirectional import Bidirectional, bidirectional_attention
from polyak.ops.attention.causal import attend
from polyak.ops.attention.fla_kernels import attend_by_kernels, kernels_serve
from polyak.ops.attention.options import AttentionOptions, AttentionState, settings_of
from polyak.ops.attention.recurrence import recur, step
from polyak.ops.attention.reference import linear_attention_reference
from polyak.ops.attention.weights import linear_weights
from polyak.ops.reference import using_reference_forms


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bidirectional: Bidirectional | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Linear attention of every query over the keys up to its own.

    With :math:`q = \varphi(query)`, :math:`k = \varphi(key)` and every :math:`U_j = k_j v_j^T`,

    .. math:: S_i = S_{i-1} + U_i, \quad Z_i = Z_{i-1} + k_i, \quad
        o_i = \frac{q_i^T S_i}{q_i \cdot Z_i + eps}.

    Computed in chunks, with a gradient written by hand: time and memory are linear in T.  States
    and sums are float32 or better, under autocast too.

    Args:
        query: (B, T, H, D).
        key: (B, T, Hₖ, D); H is a multiple of Hₖ, and each state serves H/Hₖ query heads.
        value: (B, T, Hₖ, M).
        bidirectional: None is causal.  Otherwise every query reads every key: `two_sided` and
            `read_after_write` are the same here; `lra` divides by √T instead of normalizing.
        options: see `AttentionOptions`.

    Returns:
        (B, T, H, M) in value's dtype.

    Raises:
        ConfigError: shapes that do not fit together, or options that cannot work.
        UnknownNameError: an option, or a name, that does not exist.
    """
    if bidirectional is not None:
        one = torch.ones((), dtype=torch.float64, device=key.device)
        settings = settings_of(options)
        return bidirectional_attention(query, key, value, 0 * one, one, bidirectional, settings)
    return linear_attention_with_state(query, key, value, **options)[0]


def linear_attention_with_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """`linear_attention` that goes on from a state, and returns the one after the last token.

    In 16 bits on CUDA by flash-linear-attention's kernels, if they are there (`fla_kernels`).

    Raises:
        ConfigError: as there, or a state of other shapes.
    """
    settings = settings_of(options)
    if using_reference_forms():
        return linear_attention_reference(query, key, value, state, settings)
    if kernels_serve(query, key, value, settings):
        return attend_by_kernels(query, key, value, state, settings)
    return attend(query, key, value, state, settings, linear_weights, momentum=False)


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """One token of `linear_attention`, (B, H, D), (B, Hₖ, D), (B, Hₖ, M) → (B, H, M).

    Returns the state after it too.  key_mask and document_starts are (B,) here.
    """
    return step(query, key, value, None, None, state, settings_of(options))


def linear_attention_recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """`linear_attention_with_state` token by token: `linear_attention_step` T times."""
    return recur(query, key, value, None, None, state, settings_of(options))
