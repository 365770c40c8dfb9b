"""The hand-written gradient of the walk over chunks: section by section, from the end.

With n the numerators, d the denominators and o = n/d the outputs: dn = do/d, dd = −⟨dn, o⟩; then
the transpose of each product, and the states' gradients against time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.ops.attention.feature_maps import FEATURE_MAPS
from polyak.ops.attention.sections import (
    Form,
    Memory,
    Section,
    grouped,
    per_row,
    put,
    scaled,
    sections,
    take,
)
from polyak.ops.attention.states import Operands, add_product, advance, go_back, operands
from polyak.ops.attention.weights import Weights


class Place(NamedTuple):
    """A section of some rows of the batch, in a walk of that form."""

    form: Form
    part: Section
    lane: slice


class WeightGradients:
    """The gradients of those weights that need one, summed over what shares them."""

    def __init__(self, weights: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> None:
        self.found = [
            w.new_zeros(w.shape) if n and w is not None else None
            for w, n in zip(weights, needed, strict=True)
        ]

    def add(self, name: str, where: Place, grad: Callable[[], Tensor]) -> None:
        """Add grad(), (N, B, H, …) for a section's chunks, if that weight needs its gradient."""
        part = where.part
        half = len(Weights._fields) * (part.size != where.form.chunk)  # weights of the rest
        total = self.found[Weights._fields.index(name) + half]
        if total is None:
            return
        first = part.start // part.size
        if total.shape[0] > 1:
            total = total[first : first + part.number]
        if total.shape[1] > 1:
            total = total[:, where.lane]
        total += grad().sum_to_size(total.shape)


def gradients(
    form: Form,
    weights: tuple[Weights, Weights | None],
    inputs: tuple[Tensor, Tensor, Tensor],
    state: Memory,
    outputs: tuple[Tensor, Tensor | None],
    kept: list[Memory],
    grads: tuple[Tensor | None, Memory],
    by_weights: WeightGradients,
) -> tuple[list[Tensor], Memory]:
    """Gradients of (query, key, value) and of the state before the first token.

    With form.recompute the states are computed anew, one row of the batch at a time.

    Args:
        form: as in the walk.
        weights: of whole chunks and of the rest.
        inputs: query, key and value, before the feature map.
        state: the one before the first token.
        outputs: the outputs and what they were divided by, if normalized, (B, T, H, 1).
        kept: the states of each section; none with form.recompute.
        grads: of the outputs and of the state after the last token.
        by_weights: where gradients of weights are added.
    """
    by = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    before = grads[1].clone()
    rows = inputs[0].shape[0]
    lanes = [slice(b, b + 1) for b in range(rows)] if form.recompute else [slice(None)]
    for lane in lanes:
        query, key, value = (t[lane] for t in inputs)
        out, below, by_out = (None if t is None else t[lane] for t in (*outputs, grads[0]))
        assert out is not None
        whole, rest = (None if w is None else w.rows(lane) for w in weights)
        assert whole is not None
        parts = list(sections(query, form, whole, rest))
        memories = kept
        if form.recompute:
            memories, now = [], state.at(lane)
            for part in parts:
                at = operands(query, key, value, part, form, out.dtype)
                memories.append(advance(at, now, part.weights))
                now = memories[-1].at(-1)
        after = before.at(lane)
        for part, memory in zip(reversed(parts), reversed(memories), strict=True):
            where = Place(form, part, lane)
            at = operands(query, key, value, part, form, out.dtype)
            dn, dd = _of_outputs(by_out, out, below, part, key.shape[2])
            by_part = _inside(at, dn, dd, where, by_weights)
            after = _outside(at, dn, dd, memory, after, by_part, where, by_weights)
            slope = FEATURE_MAPS[form.feature_map].slope
            by_part.q.mul_(slope(at.q))
            by_part.k.mul_(slope(at.k))
            for gradient, into in zip(by_part, by, strict=True):
                put(gradient, part, into[lane])
        before.set(lane, after)
    return by, before


def _of_outputs(
    by_out: Tensor | None, out: Tensor, below: Tensor | None, part: Section, heads: int
) -> tuple[Tensor, Tensor | None]:
    """dn and dd of a section."""
    dn = take(torch.zeros_like(out) if by_out is None else by_out, part, heads, out.dtype)
    if below is None:
        return dn, None
    dn = dn.div_(take(below, part, heads, out.dtype, filling=1.0))
    return dn, -torch.linalg.vecdot(dn, take(out, part, heads, out.dtype))[..., None]


def _inside(
    at: Operands,
    dn: Tensor,
    dd: Tensor | None,
    where: Place,
    by_weights: WeightGradients,
) -> Operands:
    """Gradients of q, k and v by the products within chunks."""
    w, size = where.part.weights, where.part.size
    a, da = at.q @ at.k.mT, dn @ at.v.mT
    pairs, dpairs = grouped(a, size), grouped(da, size)
    mix = w.mix[:, :, :, None]
    if dd is not None and w.norm is None:
        da.add_(dd)
    by_weights.add("mix", where, lambda: (pairs * dpairs).sum(3))
    dpairs.mul_(mix)
    if dd is not None and w.norm is not None:
        dpairs.addcmul_(grouped(dd, size), w.norm[:, :, :, None])
    pairs.mul_(mix)
    return Operands(da @ at.k, da.mT @ at.q, a.mT @ dn)


def _outside(
    at: Operands,
    dn: Tensor,
    dd: Tensor | None,
    states: Memory,
    after: Memory,
    by: Operands,
    where: Place,
    by_weights: WeightGradients,
) -> Memory:
    """Add to `by` what comes by the states; return the gradient of the state before the section.

    after: the gradient of the state after it.
    """
    w, number = where.part.weights, where.part.number
    s, p, z = states.at(slice(number))
    kept = scaled(at.q, w.keep)
    read_z = torch.zeros_like(z) if dd is None else (kept.mT @ dd)[..., 0]
    read_p = None if p is None else scaled(at.q, w.read).mT @ dn
    grads = go_back(after, Memory(kept.mT @ dn, read_p, read_z), w)
    ds, dp, dz = grads.at(slice(1, None))
    # by reading
    dkept = add_product(by.q, dn, s.mT) if w.keep is None else dn @ s.mT
    if dd is not None:
        dkept.addcmul_(dd, z[..., None, :])
    if w.keep is not None:
        by.q.addcmul_(dkept, per_row(w.keep, by.q.shape[-2]))
    # by writing
    _written(at, by, ds, w.write, lambda g: by_weights.add("write", where, g))
    if w.tally is None:
        by.k.add_(dz[..., None, :])
    else:
        by.k.addcmul_(dz[..., None, :], w.tally[..., None])
    if p is not None:
        assert dp is not None
        assert w.read is not None
        dread = dn @ p.mT
        by.q.addcmul_(dread, per_row(w.read, by.q.shape[-2]))

        def by_read() -> Tensor:
            within = grouped((dread * at.q).sum(-1, keepdim=True), where.part.size).sum((3, 5))
            within[..., -1] += (ds * p).sum((-1, -2))
            return within

        by_weights.add("read", where, by_read)
        by_weights.add("decay", where, lambda: (dp * p).sum((-1, -2)))
        _written(at, by, dp, w.push, lambda g: by_weights.add("push", where, g))
    return grads.at(0)


def _written(
    at: Operands,
    by: Operands,
    grad: Tensor,
    weight: Tensor | None,
    add: Callable[[Callable[[], Tensor]], None],
) -> None:
    """Add to `by` the gradients of Σ weight_s k_s v_sᵀ."""
    add_product(by.v, scaled(at.k, weight), grad)
    if weight is None:
        add_product(by.k, at.v, grad.mT)
        return
    dk = at.v @ grad.mT
    add(lambda: (dk * at.k).sum(-1))
    by.k.addcmul_(dk, weight[..., None])
