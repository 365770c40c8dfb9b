"""What attention with a matrix state is given and what it remembers, and the checks of both."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from polyak.errors import ConfigError, unknown
from polyak.ops.attention.feature_maps import feature_map_named
from polyak.ops.autograd import in_legacy_vmap

Scale = Literal["none", "head_dim", "sqrt_length"]
FirstStep = Literal["unit", "gamma"]


class AttentionState(NamedTuple):
    """All that attention remembers of the tokens so far; one per key/value head.

    S (B, H, D, M) is what queries read, Z (B, H, D) the sum of keys, P (B, H, D, M) the momentum
    (None for linear attention).  Adaptive momentum also keeps the last key (after the feature map)
    and value, (B, H, D) and (B, H, M), and how many tokens there were in each row's document, (B,).
    In float32 or better.  Never changed in place: whoever holds a state (beams, speculative
    decoding) can go on from it again.  The first dimension of every tensor is the batch.
    """

    S: Tensor
    P: Tensor | None
    Z: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    seen: Tensor | None = None

    def rows(self, index: Tensor) -> AttentionState:
        """The state of other rows of the batch: beams that were kept, or repeated."""
        found: Any = (None if t is None else t[index] for t in self)
        return AttentionState(*found)


class AttentionOptions(TypedDict, total=False):
    """Options that linear, momentum and adaptive momentum attention share.

    feature_map: φ of queries and keys: elu1, relu, identity or softplus.
    normalize: divide by q·Z + eps; otherwise the numerator alone.
    weighted_normalizer: Z weighs keys as S does, so that each output is an average of values; S and
        P then have one more column, which is the weighted Z.
    eps: added to the denominator.
    scale: factor of every q·k: `none` is 1, `head_dim` 1/√D, `sqrt_length` 1/√(number of real keys)
        (bidirectional only: causal attention does not know it).
    chunk_size: tokens at a time.
    recompute: keep no states inside a section for the gradient: less memory, more time.
    key_mask: (B, T), true or 1 for real tokens.  Others leave the state as it is.
    document_starts: (B, T), true or 1 where a new document begins: the state is reset before it.
    """

    feature_map: str
    normalize: bool
    weighted_normalizer: bool
    eps: float
    scale: Scale
    chunk_size: int
    recompute: bool
    key_mask: Tensor | None
    document_starts: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`AttentionOptions` with their defaults, checked."""

    feature_map: str = "elu1"
    normalize: bool = True
    weighted_normalizer: bool = False
    eps: float = 1e-6
    scale: Scale = "none"
    chunk_size: int = 64
    recompute: bool = False
    key_mask: Tensor | None = None
    document_starts: Tensor | None = None

    def __post_init__(self) -> None:
        feature_map_named(self.feature_map)
        if self.scale not in get_args(Scale):
            raise unknown("scale", self.scale, get_args(Scale))
        if self.chunk_size < 1:
            raise ConfigError(f"chunk_size={self.chunk_size} must be at least 1")
        if self.eps < 0:
            raise ConfigError(f"eps={self.eps} must not be negative")
        if self.weighted_normalizer and not self.normalize:
            raise ConfigError("weighted_normalizer=True needs normalize=True")

    def factor(self, head_dim: int) -> float:
        """What every q·k of causal attention is multiplied with."""
        if self.scale == "sqrt_length":
            raise ConfigError(
                "scale='sqrt_length' needs bidirectional: causal attention does not know the length"
            )
        return 1.0 if self.scale == "none" else float(head_dim**-0.5)


_KNOWN = tuple(field.name for field in fields(Settings))  # torch.compile cannot ask for them


def settings_of(options: AttentionOptions) -> Settings:
    """The options given and the defaults of the others.

    Raises:
        UnknownNameError: an option, feature map or scale that does not exist.
        ConfigError: a value that cannot work.
    """
    for name in options:
        if name not in _KNOWN:
            raise unknown("option", name, _KNOWN)
    return Settings(**options)


def check_shapes(query: Tensor, key: Tensor, value: Tensor, same_length: bool = True) -> None:
    """Refuse tensors that do not fit together: (B, T, H, D), (B, T, Hₖ, D), (B, T, Hₖ, M)."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4:
            raise ConfigError(
                f"{name} of shape {tuple(t.shape)} must be (batch, time, heads, width)"
            )
    if key.shape[:3] != value.shape[:3]:
        raise ConfigError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must agree in batch, time "
            "and heads"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ConfigError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch and width"
        )
    if same_length and query.shape[1] != key.shape[1]:
        raise ConfigError(
            f"query has {query.shape[1]} positions and key {key.shape[1]}: causal attention needs "
            "as many; bidirectional='read_after_write' does not"
        )
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ConfigError(
            f"query has {query.shape[2]} heads: not a multiple of the {key.shape[2]} of "
            "key and value"
        )


def check_tokens(name: str, tokens: Tensor | None, key: Tensor) -> Tensor | None:
    """A (B, T) tensor of yes and no as bool.

    Raises:
        ConfigError: another shape, or other numbers than 0 and 1.
    """
    if tokens is None:
        return None
    if tokens.shape != key.shape[:2]:
        raise ConfigError(
            f"{name} of shape {tuple(tokens.shape)} must be (batch, time) = "
            f"{tuple(key.shape[:2])}: linear attention can leave out tokens, not single pairs"
        )
    if tokens.dtype == torch.bool:
        return tokens
    if _values_at_hand(tokens) and not bool(((tokens == 0) | (tokens == 1)).all()):
        raise ConfigError(f"{name} must hold only 0 and 1 (real tokens: 1), or false and true")
    return tokens != 0


def coefficient(
    name: str, value: Tensor | float, key: Tensor, *, below_one: bool = False
) -> Tensor:
    """mu or gamma as a float64 tensor of shape () or (Hₖ,).

    Raises:
        ConfigError: outside [0, 1) (mu), or not positive (gamma), or of another shape.
    """
    heads = key.shape[2]
    wanted = "at least 0 and below 1" if below_one else "positive"
    if not isinstance(value, Tensor):
        if not (0 <= value < 1 if below_one else 0 < value < math.inf):
            raise ConfigError(f"{name}={value:g} must be {wanted}")
        return torch.tensor(value, dtype=torch.float64, device=key.device)
    found = value.to(key.device)
    if found.numel() == 1:
        found = found.reshape(())
    elif found.shape != (heads,):
        raise ConfigError(
            f"{name} of shape {tuple(found.shape)} must be a number or ({heads},): one for each "
            "key/value head"
        )
    if _values_at_hand(value):
        numbers = found.detach()
        fits = (numbers >= 0) & (numbers < 1) if below_one else (numbers > 0) & numbers.isfinite()
        if not bool(fits.all()):
            wrong = float(numbers.flatten()[int((~fits).flatten().int().argmax())])
            raise ConfigError(f"{name}={wrong:g} must be {wanted}")
    return found.to(torch.float64)


def check_state(state: AttentionState | None, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a state whose tensors are missing or of another shape than these inputs make."""
    if state is None:
        return
    for name, shape in shapes.items():
        found: Any = getattr(state, name)
        if found is None or tuple(found.shape) != shape:
            have = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise ConfigError(f"state.{name} is {have}: these inputs need {shape}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What states and sums are kept in: float32 or better."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _values_at_hand(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at here: on the CPU, in no transform."""
    if not tensor.is_cpu or torch.compiler.is_compiling() or in_legacy_vmap(tensor):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None
