"""Timing the loss of a large vocabulary: why `ops.linear_cross_entropy` is as it is.

Beside the plain and the chunked form: chunks of the plain form whose logits are kept, the same
with the logits computed again in the backward pass, and torch's own function where it exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyak import ops
from polyak.bench.timing import Measurement, interleave, peak_bytes
from polyak.ops.linear_cross_entropy import tokens_per_chunk
from polyak.statistics.intervals import spread

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PLAIN = "plain"


def losses(tokens: int, vocabulary: int, width: int, rounds: int) -> list[Measurement]:
    """Forward + backward of every candidate, float32, interleaved.

    Features are N(0, 1), as after a layer norm; the weight is N(0, 0.02), as initialised.

    Args:
        tokens: N.
        vocabulary: V.
        width: d.
        rounds: timed rounds.

    Returns:
        One row per candidate: seconds and their ratio to the plain form of the same round
        (median, lowest, highest); the peak of what torch allocates, gradients included, with its
        ratio; and ‖a − b‖/‖b‖ of the loss and both gradients, b in float64.
    """
    torch.manual_seed(0)
    features, weight = torch.randn(tokens, width), 0.02 * torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (tokens,))
    size = min(tokens, tokens_per_chunk(vocabulary, torch.float32))
    candidates = _candidates(size)
    exact = _exact(features, weight, targets, size)
    steps = {k: _step(loss, features, weight, targets) for k, loss in candidates.items()}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    errors = {
        name: {
            part: float((found.double() - right).norm() / right.norm())
            for part, found, right in zip(
                ("loss", "features", "weight"), step(), exact, strict=True
            )
        }
        for name, step in steps.items()
    }
    seconds = interleave(steps, rounds)
    return [
        {
            "name": name,
            "seconds": spread(found),
            "relative_time": spread(
                [s / base for s, base in zip(found, seconds[PLAIN], strict=True)]
            ),
            "peak_bytes": peaks[name],
            "relative_peak": peaks[name] / peaks[PLAIN],
            "relative_errors": errors[name],
        }
        for name, found in seconds.items()
    ]


def _candidates(size: int) -> dict[str, Loss]:
    found: dict[str, Loss] = {
        PLAIN: partial(ops.linear_cross_entropy, method="plain"),
        "chunked": partial(ops.linear_cross_entropy, method="chunked"),
        "kept chunks": partial(_in_chunks, _plain, size),
        "recomputed": partial(_in_chunks, _recomputed, size),
    }
    torchs: Any = getattr(F, "linear_cross_entropy", None)  # torch 2.13
    if torchs is not None:
        options: Any = torch.nn.LinearCrossEntropyOptions
        found["torch"] = partial(torchs, reduction="sum")
        found["torch chunks"] = partial(torchs, reduction="sum", options=options())
        found[f"torch {size}"] = partial(
            torchs, reduction="sum", options=options(batch_chunk_size=size)
        )
    return found


def _plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weight), targets, reduction="sum")


def _recomputed(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = checkpoint(_plain, features, weight, targets, use_reentrant=False)
    return loss


def _in_chunks(loss: Loss, size: int, features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    chunks = zip(torch.split(features, size), torch.split(targets, size), strict=True)
    return torch.stack([loss(x, weight, t) for x, t in chunks]).sum()


def _exact(features: Tensor, weight: Tensor, targets: Tensor, size: int) -> tuple[Tensor, ...]:
    """Mean loss and its gradients by the reference in float64, in chunks."""
    x, w = (t.double().requires_grad_() for t in (features, weight))
    total = torch.zeros((), dtype=torch.float64)
    for rows, t in zip(torch.split(x, size), torch.split(targets, size), strict=True):
        loss = ops.linear_cross_entropy_reference(rows, w, t) / len(targets)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    assert x.grad is not None
    assert w.grad is not None
    return total, x.grad, w.grad


def _step(
    loss: Loss, features: Tensor, weight: Tensor, targets: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    x, w = (t.clone().requires_grad_() for t in (features, weight))

    def step() -> tuple[Tensor, ...]:
        value = loss(x, w, targets) / len(targets)
        value.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert w.grad is not None
        result = value.detach(), x.grad, w.grad
        x.grad = w.grad = None
        return result

    return step
