r"""How widely attention spreads: its entropy by layer and head.

A query that sees n keys with probabilities p has entropy H = −Σ_j p_j ln p_j, from 0 (one key) to
ln n (all alike). Its mean over queries is reported in nats, and as the mean of H/ln n over the
queries with n ≥ 2, which sequences of different length share.

The probabilities are those that the model itself computes with: every call of
`scaled_dot_product_attention` is watched, whatever positions, norms or grouped heads made its
queries and keys, and its softmax is formed once more, explicitly. A rule that calls its attention
more than once in a substep has that many rows in a layer (`call`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyak.errors import RunError
from polyak.evaluation.subjects import Subject

SEQUENCES = 64
"""Sequences that entropies are taken over at most, evenly spaced."""
Tick = Callable[[int], None]


def probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ·scale) of a call of `scaled_dot_product_attention`, and which keys are visible.

    Takes that function's arguments. Returns (B, H, T, S) and a boolean tensor that broadcasts to
    it; rows that see nothing are zero.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    rows, columns = scores.shape[-2:]
    visible = torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
        visible = visible & ~torch.isneginf(attn_mask)
    scores = scores.masked_fill(~visible, -math.inf)
    # a row without a visible key would be 0/0
    chances = torch.softmax(scores.masked_fill(~visible.any(-1, keepdim=True), 0.0), -1)
    return chances.masked_fill(~visible, 0.0), visible


def entropy(chances: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over queries, in nats and relative to ln of the visible keys: (B, H) each."""
    nats = torch.special.entr(chances).sum(-1)
    keys = visible.sum(-1).expand_as(nats)
    some, several = keys >= 1, keys >= 2
    share = torch.where(several, nats / keys.clamp(min=2).to(nats.dtype).log(), 0.0)
    return (
        nats.sum(-1) / some.sum(-1).clamp(min=1),
        share.sum(-1) / several.sum(-1).clamp(min=1),
    )


class _Watch(TorchFunctionMode):
    """Gathers the entropies of every attention call, in order, and the layers that call."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []
        self.layers: list[int] = []
        self._layer = 0
        self._hooks = [block.register_forward_pre_hook(self._next) for block in blocks]

    def _next(self, *_: Any) -> None:
        self._layer += 1

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.found.append(entropy(*probabilities(*args, **kwargs)))
            self.layers.append(self._layer)
        return func(*args, **kwargs)


@torch.no_grad()
def attention_entropy(subject: Subject, ids: Tensor, tick: Tick | None = None) -> dict[str, Any]:
    """Entropy of attention by layer, call and head on some sequences; ready for JSON.

    Args:
        subject: the model.
        ids: (N, T) input ids; of more than `SEQUENCES`, that many evenly spaced rows are used.
        tick: called with 1 after every sequence.

    Returns:
        `sequences`, `length`, and `layers`: rows of `layer`, `call` (both from 1), and per head
        `nats`, `nats_se`, `relative` and `relative_se`; standard errors are over sequences.

    Raises:
        RunError: there are no probabilities: attention reads a state, or the model never calls
            `scaled_dot_product_attention`.
    """
    kind = getattr(subject.model.config, "attention", "softmax")
    if getattr(subject.model, "recurrent", False):
        raise RunError(
            f"{subject.name}: the entropy of attention does not apply: attention={kind} reads a "
            "state, and has no probabilities of keys"
        )
    count = min(SEQUENCES, len(ids))
    chosen = ids[[i * len(ids) // count for i in range(count)]]
    blocks: Any = subject.model.blocks
    rows: list[Tensor] = []
    for sequence in chosen:  # one at a time: H·T² probabilities are the memory
        with _Watch(blocks) as watch:
            subject.model(sequence[None].to(subject.device))
        calls = [watch.layers.count(layer + 1) for layer in range(len(blocks))]
        if not all(calls):
            raise RunError(
                f"{subject.name} made {len(watch.found)} calls of scaled_dot_product_attention in "
                f"{len(blocks)} layers; its attention cannot be looked into"
            )
        rows.append(torch.stack([torch.cat([nats, share]) for nats, share in watch.found]).cpu())
        if tick is not None:
            tick(1)
    values = torch.stack(rows).double()  # (N, calls, 2, H)
    mean = values.mean(0)
    error = values.std(0) / math.sqrt(count) if count > 1 else None
    # a layer's rule may call its oracle several times, another layer's once
    named = [(layer + 1, call + 1) for layer, n in enumerate(calls) for call in range(n)]
    return {
        "sequences": count,
        "length": ids.shape[1],
        "layers": [
            {
                "layer": layer,
                "call": call,
                "nats": mean[place, 0].tolist(),
                "nats_se": None if error is None else error[place, 0].tolist(),
                "relative": mean[place, 1].tolist(),
                "relative_se": None if error is None else error[place, 1].tolist(),
            }
            for place, (layer, call) in enumerate(named)
        ],
    }
