"""Linear attention by the kernels of flash-linear-attention (the extra `fla`), on CUDA in 16 bits.

`fla.ops.simple_gla.chunk_simple_gla` without a decay and at scale 1 computes S ← S + kvᵀ, o = qᵀS
for one head of keys to each of queries, and its state in float32.  The feature map and the division
by q·Z + eps are ours (theirs adds 1e-10).  Momentum and adaptive momentum have no kernel there:
momentum is the difference of two sums of which 16 bits keep too little.

Float32 is left to the walk: the kernels' products would be TF32's, below the accuracy that is
promised here.  In Triton's interpreter on a CPU (fla-core 0.6.0, float32) value, state and
gradients are within 6e-7 of the walk's; on a GPU nothing was run or timed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from polyak.errors import ConfigError
from polyak.ops.attention.causal import finish, memory
from polyak.ops.attention.feature_maps import feature_map_named
from polyak.ops.attention.options import AttentionState, Settings, check_shapes
from polyak.ops.attention.walk import ordinary
from polyak.ops.autograd import apply, full_precision

INSTALLED = find_spec("fla") is not None and find_spec("triton") is not None
"""Whether the extra is there."""
WIDTHS = range(16, 257, 16)
"""Of heads that the kernels are used for."""


def kernels_serve(query: Tensor, key: Tensor, value: Tensor, options: Settings) -> bool:
    """Whether these inputs go through the kernels; every other is the walk's."""
    plain = torch.compiler.is_compiling() or ordinary([query, key, value])
    dtypes, widths = {t.dtype for t in (query, key, value)}, (key.shape[-1], value.shape[-1])
    return same_function(INSTALLED, value.device.type, dtypes, widths, options) and plain


def same_function(
    installed: bool,
    device: str,
    dtypes: set[torch.dtype],
    widths: tuple[int, int],
    options: Settings,
) -> bool:
    """Whether the kernels are there and compute what is asked for.

    Args:
        installed: whether the extra is.
        device: type of the tensors' device.
        dtypes: of queries, keys and values.
        widths: D of keys and M of values.
        options: of the attention; chunk_size and recompute, which change no result, do not count
            (the kernels choose their chunks, and always compute states again).
    """
    return (
        installed
        and device == "cuda"
        and dtypes in ({torch.float16}, {torch.bfloat16})
        and all(width in WIDTHS for width in widths)
        and options.key_mask is None
        and options.document_starts is None
        and not options.weighted_normalizer
    )


def attend_by_kernels(
    query: Tensor, key: Tensor, value: Tensor, state: AttentionState | None, options: Settings
) -> tuple[Tensor, AttentionState]:
    """As `linear_attention_with_state`, for inputs that `kernels_serve`.

    Raises:
        ConfigError: as there; or, from a backward pass, that its gradient is wanted.
    """
    check_shapes(query, key, value)
    chunked: Any = import_module("fla.ops.simple_gla").chunk_simple_gla
    factor, dtype = options.factor(key.shape[3]), value.dtype
    group = query.shape[2] // key.shape[2]
    s, _, z = memory(state, key, value, momentum=False)
    with full_precision(query.device):
        phi = feature_map_named(options.feature_map).apply
        q, k = phi(query.to(s.dtype)).to(dtype), phi(key.to(s.dtype)).to(dtype)
        out, after = chunked(
            q.contiguous(),
            *(t.repeat_interleave(group, dim=2) for t in (k, value)),
            scale=1.0,
            initial_state=s.repeat_interleave(group, dim=1),
            output_final_state=True,
        )
        out, after = apply(_Once, out), apply(_Once, after)
        sums = z[:, None] + k.to(s.dtype).cumsum(1)
        out = out.to(s.dtype)
        if options.normalize:
            below = (q.to(s.dtype) * sums.repeat_interleave(group, dim=2)).sum(-1, keepdim=True)
            out = out / (below + options.eps / factor)
        out = finish(out, options, factor).to(dtype)
        return out, AttentionState(after[:, ::group], None, sums[:, -1])


class _Once(torch.autograd.Function):
    """x, of which no gradient of a gradient is had: the kernels' would be 0 without a word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ConfigError(
                "flash-linear-attention's kernels have no gradient of their gradient; compute in "
                "float32, or under polyak.ops.reference_forms()"
            )
        return grad
