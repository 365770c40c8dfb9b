r"""Attention with a matrix state in closed form: what a block is cut at, beside softmax attention.

Linear and momentum attention are sums over earlier tokens with fixed weights w_ij, of queries and
keys after the feature map and with the normalizer's weights n_ij (1, w_ij, or none at all):

    o_i = Σ_{j≤i} w_ij (q_i·k_j) v_j / m_i,   m_i = Σ_{j≤i} n_ij q_i·k_j + eps,
    do_i = Σ_{j≤i} [A_ij dv_j + (G_ij v_j − C_ij o_i)(dq_i·k_j + q_i·dk_j)],

A = w_ij (q_i·k_j)/m_i, G = w_ij/m_i, C = n_ij/m_i. Without a normalizer m is 1 and C is 0.
Adaptive momentum's weights depend on all earlier keys and values, so it has no such form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from polyak.nn.attention.linear import LinearAttention
from polyak.nn.attention.momentum import MomentumAttention
from polyak.nn.context import Context
from polyak.nn.transformer import Transformer
from polyak.ops import FEATURE_MAPS


def read(q: Tensor, k: Tensor, v: Tensor, module: Any, context: Context | None) -> Tensor:
    """`module.attend` of a whole sequence, as a function that modes of torch can see."""
    if has_torch_function((q, k, v)):
        found: Tensor = handle_torch_function(read, (q, k, v), q, k, v, module, context)
        return found
    attended: Tensor = type(module).attend(module, q, k, v, context, 0.0)
    return attended


def show(model: Transformer) -> bool:
    """Let modes see every call of attention that has a closed form, in place.

    Returns:
        Whether every kind with a state has one; if not, the model cannot be cut.
    """
    closed = True
    for block in model.blocks:
        module: Any = block.attention
        if type(module) in (LinearAttention, MomentumAttention):
            module.attend = _visible(module)
        closed = closed and (not module.recurrent or "attend" in vars(module))
    return closed


def _visible(module: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, context, dropout: read(q, k, v, module, context)


def mapped(q: Tensor, k: Tensor, v: Tensor, module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after the feature map, and values: (B, H, T, ·), shared heads repeated."""
    phi = FEATURE_MAPS[module.options["feature_map"]].apply
    times = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(times, dim=1) for part in (phi(k), v))
    return phi(q), k, v


def shares(
    q: Tensor, k: Tensor, module: Any, context: Context | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A, G and C of the module, from mapped q and k (H, T, D): (H, T, T) each, lower triangular."""
    heads, tokens, width = q.shape
    options = module.options
    factor = width**-0.5 if options["scale"] == "head_dim" else 1.0
    w = _weights(module, tokens, context).to(q).repeat_interleave(heads // module.num_kv_heads, 0)
    pairs = (factor * (q @ k.mT)).tril()
    if not options["normalize"]:
        return w * pairs, factor * w, torch.zeros_like(w)
    n = w if options.get("weighted_normalizer") else torch.ones_like(w).tril()
    m = (n * pairs).sum(-1, keepdim=True) + options["eps"]
    return w * pairs / m, factor * w / m, factor * n / m


def _weights(module: Any, tokens: int, context: Context | None) -> Tensor:
    """w_ij for every kv head, in float64."""
    ones = torch.ones(module.num_kv_heads, tokens, tokens, dtype=torch.float64).tril()
    if isinstance(module, LinearAttention):
        return ones
    values = (module.coefficient(name, context) for name in ("mu", "gamma"))
    mu, gamma = (
        torch.as_tensor(value, dtype=torch.float64, device="cpu").expand(module.num_kv_heads)
        for value in values
    )
    sums = (mu[:, None] ** torch.arange(tokens, dtype=torch.float64)).cumsum(-1)  # w(1), w(2), …
    place = torch.arange(tokens)
    newest = tokens - 1 if module.sees_length else place[:, None]
    gap = (newest - place).clamp(min=0).expand(tokens, tokens)
    return gamma[:, None, None] * sums[:, gap] * ones
