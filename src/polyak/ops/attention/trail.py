"""For adaptive momentum: which token came before each, and how much U = k vᵀ has changed since."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polyak.ops.attention.options import AttentionState


class Trail(NamedTuple):
    """The real token before each (of its key and value, (B, T, H, …)), and the last of all.

    first (B, T): whether a document's real tokens begin here; None: only where there is no state.
    key, value (B, H, …), seen (B,): of the state after the last token.
    """

    keys_before: Tensor
    values_before: Tensor
    first: Tensor | None
    key: Tensor
    value: Tensor
    seen: Tensor


def trail(
    k: Tensor, v: Tensor, state: AttentionState, mask: Tensor | None, starts: Tensor | None
) -> Trail:
    """The trail of keys (after the feature map) and values, (B, T, H, …), T at least 1."""
    assert state.key is not None
    assert state.value is not None
    assert state.seen is not None
    keys, values = (
        torch.cat((last[:, None], x), dim=1) for last, x in ((state.key, k), (state.value, v))
    )
    if mask is None and starts is None:
        seen = state.seen + k.shape[1]
        return Trail(keys[:, :-1], values[:, :-1], None, k[:, -1], v[:, -1], seen)
    none = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    real = ~none if mask is None else mask
    document = (none if starts is None else starts).cumsum(1)
    # places in `keys`: 0 is the state's, 1 + t is token t
    places = torch.arange(1, k.shape[1] + 1, device=k.device) * real
    newest = torch.cat((torch.zeros_like(places[:, :1]), places.cummax(1).values), dim=1)
    before = newest[:, :-1]
    documents = torch.cat((torch.zeros_like(document[:, :1]), document), dim=1)
    known = torch.cat((state.seen[:, None] > 0, real), dim=1)
    alike = documents.gather(1, before) == document
    first = real & ~(alike & known.gather(1, before))
    ours = real & (document == document[:, -1:])
    seen = ours.sum(1) + torch.where(document[:, -1] == 0, state.seen, 0)
    row = torch.arange(k.shape[0], device=k.device)
    last, any_seen = newest[:, -1], (seen > 0)[:, None, None]
    return Trail(
        keys[row[:, None], before],
        values[row[:, None], before],
        first,
        torch.where(any_seen, keys[row, last], 0),
        torch.where(any_seen, values[row, last], 0),
        seen,
    )


def change(k: Tensor, v: Tensor, behind: Trail) -> Tensor:
    """√|U − U before|, (B, T, H), without a gradient where U did not change.

    With dk and dv the differences of keys and values, |U − U'|² is |k|²|dv|² + |dk|²|v'|² +
    2(k·dk)(dv·v'): small changes are not lost beside U.
    """
    dk, dv, v_before = k - behind.keys_before, v - behind.values_before, behind.values_before
    dot = torch.linalg.vecdot
    first, second = dot(k, k) * dot(dv, dv), dot(dk, dk) * dot(v_before, v_before)
    mixed = 2 * dot(k, dk) * dot(dv, v_before)
    squared = first + second + mixed
    # the same U by another k and v: all that is left is rounding
    noise = 4 * torch.finfo(k.dtype).eps * (first + second + mixed.abs())
    moved = squared > noise
    return torch.where(moved, torch.where(moved, squared, 1).pow(0.25), 0)
