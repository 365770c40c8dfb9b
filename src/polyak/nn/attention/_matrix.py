r"""`MatrixAttention`: kinds that remember a matrix for each head instead of all keys and values.

With q and k after the feature map φ and o read from a state S, time is linear in the length and
decoding takes constant memory. What a kind adds is how S moves; see `polyak.ops`, where each is
computed in chunks, with states in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from polyak.errors import ConfigError
from polyak.nn.attention import Attention, choice, flag, number, whole
from polyak.nn.context import Context
from polyak.ops import AttentionState

_NORMALIZED = {"bidirectional": ("two_sided", "read_after_write")}
"""The forms in which a normalizer and a scale have an effect."""
_IN_CHUNKS = {"bidirectional": ("two_sided",)}


class MatrixAttention(Attention):
    r"""Attention through a state of one D × D matrix and one key sum for each kv head.

    - Grouped queries: H/H_kv query heads read one state.
    - Rotary positions turn queries and keys before φ; scores depend on the distance of two tokens
      alone only with feature_map=identity.
    - Dropout: there are no attention weights to drop, so `dropout` drops the output only.
    - Padding leaves the state as it is, wherever it stands; a query that sees no real key reads 0.
    """

    recurrent = True
    feature_map = choice(
        "elu1",
        "relu",
        "identity",
        "softplus",
        about="φ of queries and keys: elu(x) + 1, max(x, 0), x, or ln(1 + eˣ)",
    )
    normalize = flag(True, about="divide by q·Z + eps, Z the sum of keys", needs=_NORMALIZED)
    eps = number(1e-6, about="added to the divisor", needs={**_NORMALIZED, "normalize": (True,)})
    scale = choice(
        "none",
        "head_dim",
        "sqrt_length",
        about="factor of every q·k: 1, 1/√D, or 1/√(number of real tokens), which a causal model "
        "does not know",
        needs=_NORMALIZED,
    )
    chunk_size = whole(
        64, about="tokens at a time; changes the time, not the result", needs=_IN_CHUNKS
    )
    recompute = flag(
        False,
        about="compute states again for the gradient: less memory, more time",
        needs=_IN_CHUNKS,
    )

    whole_sequence: ClassVar[Callable[..., Tensor]]
    """(q, k, v, options) → outputs, all (B, T, heads, D)."""
    continued: ClassVar[Callable[..., tuple[Tensor, AttentionState]]]
    """(q, k, v, state, options) → outputs and the state after the last token."""
    one_token: ClassVar[Callable[..., tuple[Tensor, AttentionState]]]
    """The same for one token, (B, heads, D)."""

    @classmethod
    def resolve(cls, options: Mapping[str, Any], *, causal: bool) -> dict[str, Any]:
        """See `Attention.resolve`."""
        found = super().resolve(options, causal=causal)
        if causal and found["scale"] == "sqrt_length":
            raise ConfigError(
                "attention option scale='sqrt_length' needs causal=false: a causal model does not "
                "know the length; use none or head_dim"
            )
        return found

    def given(self, context: Context | None) -> dict[str, Any]:
        """The options as the kind's ops take them, coefficients included."""
        names = ("feature_map", "normalize", "eps", "scale", "chunk_size", "recompute")
        return {name: self.options[name] for name in names}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context | None, dropout: float
    ) -> Tensor:
        """See `Attention.attend`; the state of this call comes from the context's cache."""
        kind, given = type(self), self.given(context)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, D)
        if context is not None:
            given["key_mask"] = context.real_keys(k.shape[1])
        if context is None or context.cache is None:
            return kind.whole_sequence(q, k, v, **given).transpose(1, 2)
        state = context.recall(k.shape[0])
        if k.shape[1] == 1:
            mask = given["key_mask"]
            given["key_mask"] = None if mask is None else mask[:, 0]
            y, state = kind.one_token(q[:, 0], k[:, 0], v[:, 0], state, **given)
            y = y[:, None]
        else:
            y, state = kind.continued(q, k, v, state, **given)
        context.remember(state, k.shape[1])
        return y.transpose(1, 2)
