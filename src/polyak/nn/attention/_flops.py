r"""Formulas for the matrix products of attention through chunks (`polyak.ops`), 2mnk each."""

from __future__ import annotations

from typing import Any

from polyak.nn.config import ModelConfig


def walk_flops(
    config: ModelConfig, options: dict[str, Any], tokens: int, momentum: bool
) -> tuple[int, int]:
    """Products of a causal walk over chunks (`polyak.ops`), with a momentum or without.

    Of a chunk of c tokens, with queries of H heads, keys of H_kv, D numbers wide, values M wide,
    what it reads and writes inside, of the states before it and to those after it.
    """
    heads, groups, d = config.num_heads, config.kv_heads, config.head_width
    weighted = options.get("weighted_normalizer", False)
    m, states = d + weighted, 1 + momentum
    divide = options["normalize"] and not weighted
    forward = backward = 0
    for c in chunks(tokens, options["chunk_size"]):
        square, read, write = heads * c * c, heads * c * d * m, groups * c * d * m
        forward += 2 * square * (d + m) + 2 * read * states + 2 * write * states
        backward += 2 * square * (3 * d + 2 * m) + 4 * read * states + 4 * write * states
        backward += 2 * write * states * options["recompute"]
        if divide:
            forward += 2 * heads * c * d
            backward += 2 * heads * c * d
    return forward, backward


def adaptation_flops(config: ModelConfig, options: dict[str, Any], tokens: int) -> tuple[int, int]:
    """Products by which adaptive momentum's coefficients are found, beside the walk."""
    groups, d = config.kv_heads, config.head_width
    forward = backward = 0
    for c in chunks(tokens, options["chunk_size"]):
        pairs, state = 2 * groups * c * c * d, 2 * groups * c * d * d
        forward += 2 * pairs + 2 * state
        backward += 4 * pairs + 5 * state + 2 * groups * c * (c + 1)
    return forward, backward


def bidirectional_flops(
    config: ModelConfig, options: dict[str, Any], tokens: int
) -> tuple[int, int]:
    """Products where every query reads every key: two walks, or one sum that all queries read."""
    weighted = options.get("weighted_normalizer", False)
    if options["bidirectional"] == "two_sided":
        one_way = walk_flops(config, {**options, "normalize": weighted}, tokens, momentum=True)
        forward, backward = 2 * one_way[0], 2 * one_way[1]
    else:
        heads, d = config.num_heads + config.kv_heads, config.head_width
        forward = 2 * heads * tokens * d * (d + weighted)
        backward = 2 * forward
    if options["bidirectional"] != "lra" and options["normalize"] and not weighted:
        below = 2 * config.num_heads * tokens * config.head_width
        forward, backward = forward + below, backward + 2 * below
    return forward, backward


def chunks(tokens: int, size: int) -> list[int]:
    """Lengths of the chunks that a sequence is cut into."""
    whole, rest = divmod(tokens, size)
    return [size] * whole + [rest] * (rest > 0)


def read_flops(config: ModelConfig, options: dict[str, Any]) -> int:
    """Products of a token's step: queries read the state, and the sum of keys."""
    return 2 * config.heads_width * (config.head_width + bool(options["normalize"]))
