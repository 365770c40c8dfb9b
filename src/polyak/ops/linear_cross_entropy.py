"""Cross-entropy of a large vocabulary: the output matrix and the loss as one op.

The plain form holds three tensors of all logits (tokens × vocabulary) at its peak.  The chunked
form holds the logits of a few hundred tokens, and makes both gradients while it has them: the
same products as the plain form (no recomputation), in memory that does not grow with the number
of tokens.  That the forward pass of a fused loss can make its gradients is the idea of Liger
Kernel (arXiv:2410.10989); this is our own form of it.

Measured beside it, and slower or larger: chunks whose logits are computed again by
`torch.utils.checkpoint`, chunks whose logits are kept, and torch's own `linear_cross_entropy`
(2.13), all in `polyak bench --what loss --vocab-size 50304`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from polyak.checks import check_whole
from polyak.errors import ConfigError, unknown
from polyak.ops.autograd import (
    apply_uncompiled,
    full_precision,
    in_legacy_vmap,
    to_differentiate,
)
from polyak.ops.reference import linear_cross_entropy_reference, using_reference_forms

Method = Literal["auto", "plain", "chunked"]

# Up to this size of all logits the plain form is as fast (8 MiB: 1.0, 32 MiB: 1.3 times the
# chunked form's time, 1 MiB: 0.8) and its three copies are small.
_PLAIN_BYTES = 1 << 24

# Bytes of one chunk's logits.  Each chunk reads and writes the whole (V, d) gradient of the
# weight, so it should have a few hundred tokens: at V=50,304, d=384, 256 tokens run at the speed
# of 512, and 128 take a tenth longer; 64 MiB hold 333.
_CHUNK_BYTES = 1 << 26
_FEWEST_TOKENS = 128

# No target is left out: the smallest integer, where cross_entropy's default is -100.
_IGNORED = torch.iinfo(torch.int64).min


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    method: Method = "auto",
    chunk_tokens: int | None = None,
) -> Tensor:
    r"""Return :math:`\sum_n \log\sum_v e^{x_n\cdot w_v} - x_n\cdot w_{t_n}` in nats.

    Shapes: features (N, d), weight (V, d), targets (N,) int64 to ().  The result is float32
    (float64 for float64 inputs).  Under autocast to bfloat16, or with bfloat16 inputs, the matrix
    products are bfloat16; the softmax and the sums over tokens are float32.

    The chunked form computes the gradients of whatever requires one in the forward pass, and
    keeps them (the size of `features` and of `weight`) until the backward pass scales them; under
    `torch.no_grad()` it computes none.  A second backward pass through a retained graph computes
    them again.  The gradient of the weight is summed over chunks in one (V, d) buffer.  Target
    vectors are subtracted from the softmax's averages after these are summed, which in float32
    leaves a tenth of the plain form's rounding error while the model is unsure.

    Where a derivative of the gradient may be asked for, the plain form serves every method: in
    `torch.func` transforms, in forward mode, and for tensor subclasses.  The gradient of a chunked
    loss with `create_graph=True` or `is_grads_batched=True` is computed anew by plain code.
    torch.compile runs the chunked form uncompiled, between two graphs (`fullgraph=True` needs
    `method="plain"`).

    Args:
        features: what the output matrix is applied to.
        weight: the output matrix, one row per token id.
        targets: the token ids to predict, each in [0, V).
        method: `plain` makes all logits at once, `chunked` never; `auto` takes the plain form if
            all logits in float32 (or float64) take at most 16 MiB, or for float16.
        chunk_tokens: tokens at a time in the chunked form; None: what 64 MiB of logits hold, but
            at least 128, and then chunks as equal as can be.

    Raises:
        ConfigError: an unknown method, `chunk_tokens` below 1, or the chunked form for float16,
            whose range does not hold a softmax that is not yet scaled.
        IndexError, RuntimeError: a target is not in [0, V) (raised by torch; on CUDA, later).
    """
    tokens, vocabulary = _check(features, weight, targets)
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    check_whole("chunk_tokens", chunk_tokens, optional=True)
    if using_reference_forms():
        return linear_cross_entropy_reference(features, weight, targets)
    compute = _compute_dtype(features, weight)
    if method == "chunked" and compute == torch.float16:
        raise ConfigError(
            "method='chunked' cannot work in float16; use bfloat16, or method='plain'"
        )
    entry = _exact(compute).itemsize
    if method == "plain" or compute == torch.float16:
        return _plain(features, weight, targets)
    if method == "auto" and tokens * vocabulary * entry <= _PLAIN_BYTES:
        return _plain(features, weight, targets)
    if not torch.compiler.is_compiling() and not _ordinary(features, weight, targets):
        return _plain(features, weight, targets)
    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(vocabulary, _exact(compute))
    needed = tuple(t.requires_grad and torch.is_grad_enabled() for t in (features, weight))
    result: Tensor = apply_uncompiled(
        _LinearCrossEntropy, features, weight, targets, compute, chunk_tokens, needed
    )
    return result


def tokens_per_chunk(vocabulary: int, dtype: torch.dtype) -> int:
    """How many tokens the chunked form takes at a time: logits of 64 MiB, at least 128 tokens."""
    return max(_FEWEST_TOKENS, _CHUNK_BYTES // (vocabulary * dtype.itemsize))


def _check(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[int, int]:
    """(N, V) of inputs that fit together."""
    assert features.dim() == weight.dim() == 2, "features are (N, d), weight is (V, d)"
    assert features.shape[1] == weight.shape[1], "features and weight differ in width"
    assert targets.shape == features.shape[:1], "there is one target per token"
    assert targets.dtype == torch.int64, "targets are int64"
    return features.shape[0], weight.shape[0]


def _compute_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """What the matrix products are computed in: as torch's own linear layer would."""
    device = features.device.type
    double = torch.float64 in (features.dtype, weight.dtype)
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and not double:
        return torch.get_autocast_dtype(device)
    assert features.dtype == weight.dtype, "features and weight differ in dtype"
    return features.dtype


def _exact(dtype: torch.dtype) -> torch.dtype:
    """What the softmax and sums over tokens are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _ordinary(*tensors: Tensor) -> bool:
    """Whether no transform, forward mode or subclass asks for more than a first gradient."""
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not in_legacy_vmap(*tensors)
    )


def _plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(features, weight)
    logits = logits.to(_exact(logits.dtype))
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=_IGNORED)


def _chunks(tokens: int, largest: int) -> Iterator[slice]:
    """Slices of at most `largest` tokens, as equal as can be."""
    count = -(-tokens // largest)
    for i in range(count):
        yield slice(tokens * i // count, tokens * (i + 1) // count)


def _loss_and_gradients(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    compute: torch.dtype,
    chunk_tokens: int,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""The summed loss, and its gradients where they are needed.

    With e_v = exp(l_v − max l) and s = Σ e: loss log s + max l − l_t, gradients (e·W)/s − w_t for
    x and Σ_n e_n (x_n/s_n) − Σ_{t_n = v} x_n for w_v.
    """
    x, w, exact = features.to(compute), weight.to(compute), _exact(compute)
    rows = max((c.stop - c.start for c in _chunks(x.shape[0], chunk_tokens)), default=0)
    products = torch.empty(rows, w.shape[0], dtype=compute, device=x.device)
    buffer = products if compute == exact else torch.empty_like(products, dtype=exact)
    losses = torch.empty(x.shape[0], dtype=exact, device=x.device)
    by_features = torch.empty_like(features) if needed[0] else None
    by_weight = torch.zeros_like(weight, dtype=exact) if needed[1] else None
    for chunk in _chunks(x.shape[0], chunk_tokens):
        x_c, target = x[chunk], targets[chunk, None]
        held = products[: x_c.shape[0]]
        logits = torch.mm(x_c, w.T, out=held)
        if compute != exact:
            logits = buffer[: x_c.shape[0]].copy_(held)
        highest = logits.amax(1, keepdim=True)
        at_target = logits.gather(1, target)
        e = logits.sub_(highest).exp_()
        total = e.sum(1, keepdim=True)
        losses[chunk] = (total.log() + highest - at_target)[:, 0]
        e = e if compute == exact else held.copy_(e)
        if by_features is not None:
            by_features[chunk] = (e @ w).to(exact).div_(total).sub_(w[target[:, 0]])
        if by_weight is not None:
            scaled = (x_c / total).to(compute)
            if compute == exact:
                torch.addmm(by_weight, e.T, scaled, out=by_weight)
            else:
                by_weight.add_(e.T @ scaled)
    if by_weight is not None:
        by_weight.index_add_(0, targets, x.to(exact), alpha=-1)
    return losses.sum(), by_features, by_weight


def _differentiable_gradients(
    grad: Tensor, features: Tensor, weight: Tensor, targets: Tensor, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """X̄ = ḡ(P − T)W and W̄ = ḡ(P − T)ᵀX with P = softmax(XWᵀ) and T one-hot, as torch code."""
    x, w, exact = features.to(compute), weight.to(compute), _exact(compute)
    p = torch.softmax((x @ w.T).to(exact), dim=1)
    error = p.scatter_add(1, targets[:, None], p.new_full((), -1.0).expand(p.shape[0], 1))
    error = (grad * error).to(compute)
    return (error @ w).to(features.dtype), (error.T @ x).to(weight.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        compute: torch.dtype,
        chunk_tokens: int,
        needed: tuple[bool, bool],
    ) -> Tensor:
        ctx.save_for_backward(features, weight, targets)
        ctx.settings = compute, chunk_tokens, needed
        with full_precision(features.device):
            loss, *ctx.gradients = _loss_and_gradients(
                features, weight, targets, compute, chunk_tokens, needed
            )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, targets = ctx.saved_tensors
        compute, chunk_tokens, needed = ctx.settings
        unused = (None,) * 4
        with full_precision(features.device):
            if to_differentiate(grad, features, weight) or not _ordinary(grad):
                pair: tuple[Tensor | None, ...] = _differentiable_gradients(
                    grad, features, weight, targets, compute
                )
                return *(g if n else None for g, n in zip(pair, needed, strict=True)), *unused
            # Given away, so that the scaling can be in place and the caller may keep the result.
            pair, ctx.gradients = ctx.gradients, None
            if pair is None:
                _, *rest = _loss_and_gradients(
                    features, weight, targets, compute, chunk_tokens, needed
                )
                pair = tuple(rest)
        by_features, by_weight = (None if g is None else g.mul_(grad) for g in pair)
        if by_weight is not None:
            by_weight = by_weight.to(weight.dtype)
        return by_features, by_weight, *unused
