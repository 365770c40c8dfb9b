"""Momentum attention (Nguyen et al. 2022, arXiv:2208.00579): heavy-ball momentum along time."""

from __future__ import annotations

from typing import Literal, Unpack, get_args

from torch import Tensor

from polyak.errors import ConfigError, unknown
from polyak.ops.attention.bidirectional import Bidirectional, bidirectional_attention
from polyak.ops.attention.causal import attend
from polyak.ops.attention.linear import linear_attention
from polyak.ops.attention.options import (
    AttentionOptions,
    AttentionState,
    Settings,
    check_shapes,
    coefficient,
    settings_of,
)
from polyak.ops.attention.recurrence import recur, step
from polyak.ops.attention.reference import momentum_attention_reference
from polyak.ops.attention.weights import Clock, Weights, momentum_weights, released_weights
from polyak.ops.reference import using_reference_forms

MomentumForm = Literal["exact", "released"]


def momentum_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mu: Tensor | float,
    gamma: Tensor | float,
    form: MomentumForm = "exact",
    bidirectional: Bidirectional | None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor:
    r"""Linear attention whose state moves with heavy-ball momentum along the sequence.

    With :math:`q = \varphi(query)`, :math:`k = \varphi(key)` and every :math:`U_j = k_j v_j^T`,

    .. math:: P_i = \mu P_{i-1} - \gamma U_i, \quad S_i = S_{i-1} - P_i, \quad
        Z_i = Z_{i-1} + k_i, \quad o_i = \frac{q_i^T S_i}{q_i \cdot Z_i + eps},

    which is :math:`S_i = \gamma \sum_{j \le i} w(i-j+1) U_j` with
    :math:`w(n) = 1 + \mu + \dots + \mu^{n-1}`: the newest key weighs γ, old ones up to γ/(1−μ).
    μ = 0, γ = 1 is `linear_attention`.

    Computed in chunks, with a gradient written by hand: time and memory are linear in T.  States
    and sums are float32 or better, under autocast too.

    Args:
        query: (B, T, H, D).
        key: (B, T, Hₖ, D); H is a multiple of Hₖ, and each state serves H/Hₖ query heads.
        value: (B, T, Hₖ, M).
        mu: in [0, 1), a number or one for each key/value head, (Hₖ,); may be learned.
        gamma: positive, a number or (Hₖ,); may be learned.
        form: `released` is what the paper's code trains with instead: key j weighs γ w(T−j+1) for
            every query, with T the length including padding.  Only for reproducing it.
        bidirectional: None is causal; see `bidirectional_attention`.
        options: see `AttentionOptions`.

    Returns:
        (B, T, H, M) in value's dtype.

    Raises:
        ConfigError: mu or gamma out of range, shapes that do not fit together, or options that
            cannot work (together).
        UnknownNameError: an option, or a name, that does not exist.
    """
    if form not in get_args(MomentumForm):
        raise unknown("form", form, get_args(MomentumForm))
    settings = settings_of(options)
    if form == "released":
        return _released(query, key, value, mu, gamma, bidirectional, settings, options)
    if bidirectional is not None:
        check_shapes(query, key, value, same_length=False)
        pair = _coefficients(mu, gamma, key)
        return bidirectional_attention(query, key, value, *pair, bidirectional, settings)
    return momentum_attention_with_state(query, key, value, mu=mu, gamma=gamma, **options)[0]


def momentum_attention_with_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    *,
    mu: Tensor | float,
    gamma: Tensor | float,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """`momentum_attention` that goes on from a state, and returns the one after the last token.

    Raises:
        ConfigError: as there, or a state of other shapes.
    """
    settings = settings_of(options)
    check_shapes(query, key, value)
    mu, gamma = _coefficients(mu, gamma, key)
    if using_reference_forms():
        return momentum_attention_reference(query, key, value, mu, gamma, state, settings)

    def weights(at: Clock | None, chunk: int, like: Tensor) -> Weights:
        return momentum_weights(mu, gamma, at, chunk, like)

    return attend(query, key, value, state, settings, weights, momentum=True)


def momentum_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    *,
    mu: Tensor | float,
    gamma: Tensor | float,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """One token of `momentum_attention`, (B, H, D), (B, Hₖ, D), (B, Hₖ, M) → (B, H, M).

    Returns the state after it too.  key_mask and document_starts are (B,) here.
    """
    pair = _coefficients(mu, gamma, key[:, None])
    return step(query, key, value, *pair, state, settings_of(options))


def momentum_attention_recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState | None = None,
    *,
    mu: Tensor | float,
    gamma: Tensor | float,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AttentionState]:
    """`momentum_attention_with_state` token by token: `momentum_attention_step` T times."""
    check_shapes(query, key, value)
    pair = _coefficients(mu, gamma, key)
    return recur(query, key, value, *pair, state, settings_of(options))


def _coefficients(mu: Tensor | float, gamma: Tensor | float, key: Tensor) -> tuple[Tensor, Tensor]:
    return coefficient("mu", mu, key, below_one=True), coefficient("gamma", gamma, key)


def _released(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mu: Tensor | float,
    gamma: Tensor | float,
    bidirectional: Bidirectional | None,
    settings: Settings,
    options: AttentionOptions,
) -> Tensor:
    """Linear attention of values that weigh γ w(T − j + 1), with the normalizer unweighted."""
    if bidirectional is not None:
        raise ConfigError(
            f"form='released' is causal: it cannot be had with bidirectional={bidirectional!r} "
            "('lra' is the released bidirectional form)"
        )
    if settings.weighted_normalizer or settings.document_starts is not None:
        raise ConfigError(
            "form='released' has neither weighted_normalizer nor document_starts: use form='exact'"
        )
    check_shapes(query, key, value)
    weights = released_weights(*_coefficients(mu, gamma, key), key.shape[1])
    return linear_attention(query, key, value * weights[..., None].to(value.dtype), **options)
