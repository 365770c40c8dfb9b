r"""Matrix products of what a kind of attention computes, without its projections.

A kind of this package has formulas; a user's that declares none (`Attention.flops`) is measured on
the meta device, or on the CPU if it reads values while it runs. Both count as
`torch.utils.flop_counter.FlopCounterMode` does, 2mnk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from polyak.errors import AttentionError
from polyak.nn import attention
from polyak.nn.attention import Attention
from polyak.nn.attention._options import LEARNED
from polyak.nn.cache import KeyValueCache
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context

Flops = tuple[int, int]
"""Forward and backward."""


def sequence_flops(config: ModelConfig, tokens: int) -> Flops:
    """Products of one call of attention on a sequence of so many tokens.

    Raises:
        AttentionError: the kind has no formula, and fails when run to measure it.
    """
    kind = attention.get(config.attention)
    return kind.flops(config, tokens) or _measured(config, kind, tokens, _sequence)


def token_flops(config: ModelConfig, tokens: int) -> int:
    """Products of one call of attention on one more token, the last of so many.

    Raises:
        AttentionError: as `sequence_flops`.
    """
    kind = attention.get(config.attention)
    found = kind.decoding_flops(config, tokens)
    return found if found is not None else _measured(config, kind, tokens, _token)[0]


def parameters(config: ModelConfig) -> int:
    """Numbers that all layers' attention learns, without norms."""
    with torch.device("meta"):
        module = attention.get(config.attention)(config)
    norms = ("norm.", "q_norm.", "k_norm.")
    own = (p.numel() for name, p in module.named_parameters() if not name.startswith(norms))
    shared = module.raw_coefficients(module.options, LEARNED[1])
    return config.num_layers * sum(own) + len(shared)


def _measured(
    config: ModelConfig,
    kind: type[Attention],
    tokens: int,
    run: Callable[[Attention, Context, int], Flops],
) -> Flops:
    error: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                module = kind(config).eval()
                raw = module.raw_coefficients(module.options, LEARNED[1])
                shared = {name: torch.full((1,), value) for name, value in raw.items()}
                return run(module, Context(causal=config.causal, shared=shared), tokens)
        except Exception as failure:  # a user's kind may raise anything
            error = error or failure
    raise AttentionError(
        f"attention {kind.name} fails when run to measure its cost: {type(error).__name__}: {error}"
    ) from error


def _sequence(module: Attention, context: Context, tokens: int) -> Flops:
    context.length = tokens
    q, k, v = _inputs(module, tokens)
    with FlopCounterMode(display=False) as forward:
        y = module.attend(q, k, v, context, 0.0)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(y.sum())
    return forward.get_total_flops(), backward.get_total_flops()


def _token(module: Attention, context: Context, tokens: int) -> Flops:
    context.cache = KeyValueCache(tokens)
    with torch.no_grad():
        if tokens > 1:
            context.length = tokens - 1
            q, k, v = _inputs(module, tokens - 1)
            module.attend(q, k, v, context, 0.0)
        after = Context(tokens - 1, tokens, cache=context.cache, shared=context.shared)
        q, k, v = _inputs(module, 1)
        with FlopCounterMode(display=False) as counter:
            module.attend(q, k, v, after, 0.0)
    return counter.get_total_flops(), 0


def _inputs(module: Attention, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    d = module.head_dim

    def drawn(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, d).transpose(1, 2).requires_grad_()

    return drawn(module.num_heads), drawn(module.num_kv_heads), drawn(module.num_kv_heads)
