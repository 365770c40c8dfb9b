"""Causal attention with a matrix state, chunk by chunk: time and memory linear in the length.

One walk serves linear, momentum and adaptive momentum attention, which differ in their `weights`.
The gradient is written by hand (`gradients`): of a chunk's size only the states are kept for it,
or with `recompute` nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from polyak.ops.attention.gradients import WeightGradients, gradients
from polyak.ops.attention.sections import (
    Form,
    Memory,
    Section,
    grouped,
    plain_walk,
    put,
    scaled,
    sections,
)
from polyak.ops.attention.states import Operands, add_product, advance, operands
from polyak.ops.attention.weights import Weights
from polyak.ops.autograd import (
    apply_uncompiled,
    full_precision,
    gradients_again,
    in_legacy_vmap,
    to_differentiate,
)


def walk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Memory,
    form: Form,
    whole: Weights,
    rest: Weights | None,
) -> tuple[Tensor, Memory]:
    """Outputs (B, T, H, M) in the state's dtype, and the state after the last token.

    Shapes: query (B, T, H, D), key (B, T, Hₖ, D), value (B, T, Hₖ, M), before the feature map; S
    and P (B, Hₖ, D, M), Z (B, Hₖ, D).  `whole` are the weights of chunks of form.chunk tokens,
    `rest` those of a shorter last one (see `sections`).

    In forward mode, in torch.func transforms and for tensor subclasses, plain code; the gradient
    of the gradient is computed by plain code too.  torch.compile runs the walk uncompiled.
    """
    tensors = [t for t in (query, key, value, *state, *whole, *(rest or ())) if t is not None]
    with full_precision(query.device):
        if not torch.compiler.is_compiling() and not ordinary(tensors):
            return plain_walk(query, key, value, state, form, whole, rest)
        out, *after = apply_uncompiled(
            _Walk, form, query, key, value, *state, *whole, *(rest or ())
        )
    return out, Memory(*after)


def ordinary(tensors: list[Tensor]) -> bool:
    """Whether the hand-written gradient can serve: plain tensors, outside every transform."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return not any(map(in_legacy_vmap, tensors)) and all(
        type(t) in (Tensor, torch.nn.Parameter) for t in tensors
    )


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        s: Tensor,
        p: Tensor | None,
        z: Tensor,
        *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        out = torch.empty(*query.shape[:3], value.shape[3], dtype=s.dtype, device=value.device)
        below = torch.empty_like(out[..., :1]) if form.normalize else None
        state = Memory(s, p, z)
        kept: list[Tensor | None] = []
        with full_precision(query.device):
            for part in sections(query, form, *_both(weights)):
                at = operands(query, key, value, part, form, s.dtype)
                states = advance(at, state, part.weights)
                found, divisor = _read(at, states, part, form)
                put(found, part, out)
                if below is not None and divisor is not None:
                    put(divisor, part, below)
                if any(ctx.needs_input_grad) and not form.recompute:
                    kept += states
                state = states.at(-1)
        ctx.save_for_backward(query, key, value, s, p, z, out, below, *weights, *kept)
        ctx.settings = form, 8 + len(weights)
        ctx.set_materialize_grads(False)
        return out, *state.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: checkpoints hand them out once
        form, first = ctx.settings
        query, key, value, s, p, z, out, below = saved[:8]
        weights, kept = saved[8:first], saved[first:]
        tensors, needed = (query, key, value, s, p, z, *weights), ctx.needs_input_grad[1:]
        at = [t for t in (*tensors, *grads) if t is not None]
        with full_precision(query.device):
            if to_differentiate(*at) or in_legacy_vmap(*at):

                def plain(*tensors: Any) -> tuple[Tensor | None, ...]:
                    query, key, value, s, p, z, *weights = tensors
                    whole, rest = _both(tuple(weights))
                    out, after = plain_walk(query, key, value, Memory(s, p, z), form, whole, rest)
                    return out, *after

                return None, *gradients_again(plain, tensors, needed, grads)
            by_weights = WeightGradients(weights, needed[6:])
            by_inputs, by_state = gradients(
                form,
                _both(weights),
                (query, key, value),
                Memory(s, p, z),
                (out, below),
                [Memory(*kept[i : i + 3]) for i in range(0, len(kept), 3)],
                (grads[0], Memory(*map(_or_zeros, grads[1:], (s, p, z)))),
                by_weights,
            )
        every = (*by_inputs, *by_state)
        found = (g if n else None for g, n in zip(every, needed[:6], strict=True))
        return None, *found, *by_weights.found


def _or_zeros(grad: Tensor | None, like: Tensor | None) -> Any:
    return torch.zeros_like(like) if grad is None and like is not None else grad


def _read(at: Operands, states: Memory, part: Section, form: Form) -> tuple[Tensor, Tensor | None]:
    """Outputs of a section and, if normalized, what they were divided by, (…, 1)."""
    w, below = part.weights, None
    a = at.q @ at.k.mT
    pairs, kept = grouped(a, part.size), scaled(at.q, w.keep)
    if form.normalize:
        pairs.mul_((w.mix if w.norm is None else w.norm)[:, :, :, None])
        below = add_product(a.sum(-1, keepdim=True), kept, states.z[:-1, ..., None])
        below.add_(form.eps)
    if not form.normalize or w.norm is not None:
        pairs.mul_(w.mix[:, :, :, None])
    out = add_product(a @ at.v, kept, states.s[:-1])
    if states.p is not None:
        add_product(out, scaled(at.q, w.read), states.p[:-1])
    return (out if below is None else out.div_(below)), below


def _both(weights: tuple[Any, ...]) -> tuple[Weights, Weights | None]:
    half = len(Weights._fields)
    return Weights(*weights[:half]), Weights(*weights[half:]) if len(weights) > half else None
