r"""A block's derivative in pieces: what happens inside a token, and what attention passes on.

Everything in a block but attention works on each token by itself. Cut at its calls of
`scaled_dot_product_attention`, a block z ↦ F(z), z (T, c), is

    (q, k, v) = C(z)  →  o = softmax(scale·q kᵀ) v  →  F = B(z, o),

with C and B per token. Their derivatives are one small matrix per token, found by forward mode for
all tokens at once, and attention's derivative is known in closed form:

    do_i = Σ_{j≤i} A_ij [dv_j + scale·(v_j − o_i)(dq_i·k_j + q_i·dk_j)].

Linear and momentum attention are cut at their calls in the same way, after the feature map: there
v_j, o_i and dv_j have different weights (`matrix_attention`).

Of a block that calls attention several times, every call but the last passes its output on
beside z, so each piece below holds one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.overrides import TorchFunctionMode

from polyak.analysis.jacobian.matrix_attention import mapped, read, shares
from polyak.errors import ConfigError

CHUNK = 64
"""Directions differentiated at once; bounds the memory of tracing."""


@dataclass(frozen=True, eq=False)
class Attention:
    """How one call of attention passes changes of earlier tokens on.

    do_i = Σ_{j<i} [A_ij dv_j + (G_ij v_j − C_ij o_i)(q_i·dk_j)]; of softmax, A = G = C.

    Attributes:
        into: d(k, v)/dz of every token, (T, H·D + H·V, c_in).
        out_of: d(block's output)/do of every token, (T, c_out, H·V).
        weights: A below its diagonal, (H, T, T).
        of_values: G, likewise.
        of_outputs: C, likewise.
        q: queries (H, T, D), times scale.
        v: values (H, T, V).
        o: outputs (H, T, V).
    """

    into: Tensor
    out_of: Tensor
    weights: Tensor
    of_values: Tensor
    of_outputs: Tensor
    q: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """A causal map between states of T tokens: its diagonal blocks, and attention below them.

    Attributes:
        diagonal: d(output of token i)/d(input of token i), (T, c_out, c_in).
        attention: what earlier tokens add; None where tokens do not see each other.
    """

    diagonal: Tensor
    attention: Attention | None

    @property
    def bytes(self) -> int:
        """Memory it holds."""
        tensors = {id(self.diagonal): self.diagonal}
        if self.attention is not None:
            tensors |= {id(t): t for t in vars(self.attention).values()}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def cut(function: Callable[[Tensor], Tensor], z: Tensor) -> list[Piece]:
    """The derivative at z of a causal map, in pieces to be applied one after the other.

    Args:
        function: (T, c) → (T, c'); tokens may see each other only in
            `scaled_dot_product_attention` and `matrix_attention.read`.
        z: where to differentiate, (T, c).

    Raises:
        ConfigError: attention sees later positions, or drops weights at random.
    """
    with torch.no_grad():
        calls = _Recorder()
        with calls:
            out = function(z)
        found = [_closed_form(*call) for call in calls.found]
        jacobian, rows = _per_token(function, z, [call.o for call in found], out.shape[1])
        return _pieces(found, jacobian, rows, z.shape[1])


class _Recorder(TorchFunctionMode):
    """Computes attention by its equation, and keeps (q, k, v, (A, G, C), scale, o) of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is read:
            return self._read(*args)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, mask, causal, scale = _arguments(*args, **(kwargs or {}))
        scores = scale * (q @ k.transpose(-2, -1))
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        weights = torch.softmax(scores, dim=-1)
        o = weights @ v
        if q.shape[0] != 1 or q.shape[-2] != k.shape[-2] or bool(weights.triu(1).any()):
            raise ConfigError(
                "a block's attention sees later positions, and a Jacobian spectrum is for causal "
                "models: no later position may change an earlier one"
            )
        self.found.append((q[0], k[0], v[0], (weights[0],) * 3, scale, o[0]))
        return o

    def _read(self, q: Tensor, k: Tensor, v: Tensor, module: Any, context: Any) -> Tensor:
        o = read(q, k, v, module, context)
        q, k, v = mapped(q, k, v, module)
        self.found.append((q[0], k[0], v[0], shares(q[0], k[0], module, context), 1.0, o[0]))
        return o


class _Player(TorchFunctionMode):
    """Gives prescribed outputs of attention back, and keeps the (q, k, v) it was called with."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.outputs = list(outputs)
        self.asked: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is read:
            q, k, v = mapped(*args[:4])
        elif func is F.scaled_dot_product_attention:
            q, k, v, *_ = _arguments(*args, **(kwargs or {}))
        else:
            return func(*args, **(kwargs or {}))
        self.asked.append(torch.cat([_by_token(part[0]) for part in (q, k, v)], dim=-1))
        o = self.outputs[len(self.asked) - 1]
        return o.unflatten(-1, (q.shape[1], -1)).transpose(0, 1)[None]  # type: ignore[no-untyped-call]


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float]:
    """scaled_dot_product_attention's arguments; shared heads are repeated."""
    if dropout_p:
        raise ConfigError(
            f"attention drops weights at random (dropout_p={dropout_p}); call model.eval() first"
        )
    if enable_gqa:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return q, k, v, attn_mask, is_causal, scale


def _by_token(heads: Tensor) -> Tensor:
    """(H, T, D) → (T, H·D)."""
    return heads.transpose(0, 1).flatten(1)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call: scaled q, v, A, G and C below the diagonal, do_i/d(q_i, k_i, v_i), o by token.

    The derivative within a token is (T, H·V, H·(D + D + V)), block diagonal over heads.
    """

    q: Tensor
    v: Tensor
    below: tuple[Tensor, Tensor, Tensor]
    within: Tensor
    o: Tensor


def _closed_form(
    q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, o: Tensor
) -> _Call:
    heads, tokens, width = q.shape
    a, of_values, of_outputs = weights
    own, own_value, own_output = (
        w.diagonal(dim1=-2, dim2=-1)[..., None, None] for w in weights
    )  # (H, T, 1, 1)
    # Σ_j (G_ij v_j − C_ij o_i) k_jᵀ, for all i
    pairs = torch.einsum("htv,htd->htvd", v, k)
    by_q = torch.einsum("hij,hjvd->hivd", of_values, pairs)
    by_q = by_q - torch.einsum("htv,htd->htvd", o, of_outputs @ k)
    change = own_value[..., 0] * v - own_output[..., 0] * o
    by_k = torch.einsum("htv,htd->htvd", change, q)
    identity = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    by_v = own * identity
    within = torch.zeros(
        (tokens, heads, v.shape[-1], 2 * width + v.shape[-1], heads), dtype=q.dtype, device=q.device
    )
    for head in range(heads):
        parts = (scale * by_q[head], scale * by_k[head], by_v[head])
        within[:, head, :, :, head] = torch.cat(parts, dim=-1)
    # columns in the order in which q, k and v are kept: (q of all heads, k, v)
    parts_of = torch.split(within, [width, width, v.shape[-1]], dim=3)
    columns = [part.transpose(3, 4).flatten(3).flatten(1, 2) for part in parts_of]
    lower = a.tril(-1)  # kept once where they are one
    values = lower if of_values is a else of_values.tril(-1)
    outputs = lower if of_outputs is a else of_outputs.tril(-1)
    within = torch.cat(columns, dim=-1)
    return _Call(scale * q, v, (lower, values, outputs), within, _by_token(o))


def _per_token(
    function: Callable[[Tensor], Tensor], z: Tensor, outputs: Sequence[Tensor], width: int
) -> tuple[Tensor, list[int]]:
    """d(q, k, v of every call, F)/d(z, o of every call) within tokens, (T, rows, columns)."""
    point = torch.cat([z, *outputs], dim=-1)
    widths = [z.shape[1], *(o.shape[1] for o in outputs)]
    rows: list[int] = []

    def local(inputs: Tensor) -> Tensor:
        own, *given = torch.split(inputs, widths, dim=-1)
        player = _Player(given)
        with player:
            out = function(own)
        rows[:] = [part.shape[-1] for part in player.asked]
        return torch.cat([*player.asked, out], dim=-1)

    def push(direction: Tensor) -> Tensor:
        tangent: Tensor = jvp(local, (point,), (direction.expand_as(point),))[1]
        return tangent

    directions = torch.eye(sum(widths), dtype=z.dtype, device=z.device)
    # written where it stays: the parts of vmap(chunk_size=...) would be held twice
    first = vmap(push)(directions[:CHUNK])
    jacobian = first.new_empty(first.shape[1], first.shape[2], len(directions))
    jacobian[..., :CHUNK] = first.permute(1, 2, 0)
    for start in range(CHUNK, len(directions), CHUNK):
        part = vmap(push)(directions[start : start + CHUNK])
        jacobian[..., start : start + CHUNK] = part.permute(1, 2, 0)
    assert sum(rows) + width == jacobian.shape[1]
    return jacobian, rows


def _pieces(
    calls: Sequence[_Call], jacobian: Tensor, rows: Sequence[int], width: int
) -> list[Piece]:
    """The pieces of a map from the derivative within tokens; see `cut`."""
    if not calls:
        return [Piece(jacobian, None)]
    pieces, start = [], 0
    for place, call in enumerate(calls):
        q, v, within = call.q, call.v, call.within
        asked = jacobian[:, start : start + rows[place], :width]
        start += rows[place]
        size = within.shape[1]
        if place + 1 < len(calls):  # z (and what it has gathered) goes on, o beside it
            identity = torch.eye(width + size, dtype=q.dtype, device=q.device)
            below = identity.expand(len(jacobian), -1, -1)
        else:
            below = jacobian[:, start:, : width + size]
        out_of = below[..., width:].contiguous()
        diagonal = below[..., :width] + out_of @ (within @ asked)
        into = asked[:, q.shape[0] * q.shape[2] :].contiguous()
        o = call.o.unflatten(-1, (q.shape[0], -1)).transpose(0, 1)  # type: ignore[no-untyped-call]
        passed = Attention(into, out_of, *call.below, q, v, o.contiguous())
        pieces.append(Piece(diagonal, passed))
        width += size
    return pieces
