#!/usr/bin/env python
"""What the Momentum Transformer's release computes, beside its own recurrence: figures of the docs.

    python scripts/released_momentum.py

prints the tables of docs/momentum-transformer.md in Markdown. Everything is computed with
`polyak.ops` on random inputs of seed 0, in float64 except where it says float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.ops import (
    adaptive_momentum_attention,
    linear_attention,
    momentum_attention,
    momentum_attention_recurrent,
)

MUS = (0.1, 0.6, 0.9)


def inputs(tokens: int, correlation: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, T, 4, 16), each token correlated with the one before."""
    torch.manual_seed(0)
    drawn = torch.randn(3, tokens, 1, 4, 16, dtype=torch.float64)
    for t in range(1, tokens):
        fresh = (1 - correlation**2) ** 0.5 * drawn[:, t]
        drawn[:, t] = correlation * drawn[:, t - 1] + fresh
    query, key, value = drawn.transpose(1, 2)
    return query, key, value


def rows_apart(found: Tensor, expected: Tensor) -> Tensor:
    """Relative difference of every row, (T,)."""
    return (found - expected)[0].norm(dim=(1, 2)) / expected[0].norm(dim=(1, 2))


def training_form(mu: float, tokens: int = 128) -> tuple[float, float, float, float]:
    """How far the form that is trained is from the recurrence: first row, mean, last row.

    The fourth number is its distance from linear attention times γ/(1 − μ) over the first half.
    """
    query, key, value = inputs(tokens)
    exact = momentum_attention(query, key, value, mu=mu, gamma=1.0)
    released = momentum_attention(query, key, value, mu=mu, gamma=1.0, form="released")
    plain = linear_attention(query, key, value) / (1 - mu)
    apart, half = rows_apart(released, exact), rows_apart(released, plain)[: tokens // 2]
    return float(apart[0]), float(apart.mean()), float(apart[-1]), float(half.max())


def long_range_arena(mu: float, tokens: int, padded: int) -> float:
    """How far its momentum attention is from linear attention times γ/(1 − μ), at real tokens."""
    query, key, value = inputs(tokens)
    real = torch.arange(tokens)[None] < tokens - padded
    given: dict[str, Any] = {"bidirectional": "lra", "key_mask": real}
    found = momentum_attention(query, key, value, mu=mu, gamma=1.0, **given)
    plain = linear_attention(query, key, value, **given) / (1 - mu)
    return float((found - plain)[real].norm() / plain[real].norm())


def single_precision(mu: float, tokens: int = 512) -> tuple[float, float]:
    """Errors of the recurrence and of chunks in float32, relative to the largest entry."""
    query, key, value = inputs(tokens)
    exact = momentum_attention_recurrent(query, key, value, mu=mu, gamma=1.0)
    exact = exact[0] if isinstance(exact, tuple) else exact
    single = [x.float() for x in (query, key, value)]
    errors = []
    for form in (momentum_attention_recurrent, momentum_attention):
        found = form(*single, mu=mu, gamma=1.0)
        found = found[0] if isinstance(found, tuple) else found
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
    return errors[0], errors[1]


def adaptive_mu(correlation: float, tokens: int = 256) -> float:
    """Mean adaptive coefficient over tokens and heads, by the recurrence itself."""
    _, key, value = inputs(tokens, correlation)
    pairs = torch.einsum("bthd,bthm->bthdm", torch.nn.functional.elu(key) + 1, value)
    p, found = -pairs[:, 0], []
    for t in range(1, tokens):
        ratio = (pairs[:, t] - pairs[:, t - 1]).norm(dim=(-2, -1)) / p.norm(dim=(-2, -1))
        mu = (1 - ratio.sqrt()).square().clamp(0, 0.9999)
        p = mu[..., None, None] * p - pairs[:, t]
        found.append(mu)
    return float(torch.stack(found).mean())


def step_size_left(first_step: str) -> float:
    """What γ = 1.7 instead of 0.6 changes beside the size of the outputs, at the last token."""
    query, key, value = inputs(128)
    outs = [
        adaptive_momentum_attention(query, key, value, gamma=gamma, first_step=first_step) / gamma
        for gamma in (0.6, 1.7)
    ]
    return float(rows_apart(*outs)[-1])


def main() -> None:
    """Print every table."""
    print("| μ | first row | mean of 128 | last row | beside linear/(1 − μ), first 64 |")
    print("| --- | --- | --- | --- | --- |")
    for mu in MUS:
        first, mean, last, half = training_form(mu)
        print(f"| {mu} | {first:.1%} | {mean:.1%} | {last:.0e} | {half:.0e} |")
    print("\n| μ | padding of T | beside linear/(1 − μ) |\n| --- | --- | --- |")
    for mu, tokens, padded in ((0.6, 23, 8), (0.6, 1024, 24), (0.1, 2048, 48), (0.9, 1024, 0)):
        print(f"| {mu} | {padded} of {tokens:,} | {long_range_arena(mu, tokens, padded):.1e} |")
    print("\n| μ | recurrence, float32 | chunks, float32 |\n| --- | --- | --- |")
    for mu in (0.6, 0.99, 0.9999):
        loop, chunks = single_precision(mu)
        print(f"| {mu} | {loop:.0e} | {chunks:.0e} |")
    print("\n| correlation of neighbours | mean adaptive μ |\n| --- | --- |")
    for correlation in (0.0, 0.9, 0.99, 0.999):
        print(f"| {correlation} | {adaptive_mu(correlation):.2f} |")
    print("\n| first step | what γ changes |\n| --- | --- |")
    for first_step in ("unit", "gamma"):
        print(f"| {first_step} | {step_size_left(first_step):.0e} |")


if __name__ == "__main__":
    main()
