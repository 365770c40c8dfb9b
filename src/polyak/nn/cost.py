r"""What a model costs: parameters, FLOPs, elementwise work and state, from its configuration.

Matrix products are counted as `torch.utils.flop_counter.FlopCounterMode` counts them on the meta
device, 2mnk each. Softmax attention is the full T² square, causal or not, and its backward pass
four products: on the meta device it runs as plain matrix products. (A flash kernel computes the
scores once more in backward and may skip the masked half.) Kinds with a state are counted as they
run, by chunks; a user's kind that declares no price is measured (`polyak.nn.attention._cost`). The
one formula torch lacks, of an in-place `baddbmm_`, is registered by `polyak.rules._cost`.
With T the context length, d the width of the residual stream and V the vocabulary, one token's
forward pass takes

    layers · (2dD(2H + 2H_kv) + 4·T·H·D + 2m·d·w) + 2dV + the rule's own products,

with H heads of D dimensions, H_kv of them for keys and values, and m matrices of the MLP, of width
w (in the paper's models, H·D = d: 2·3d² + 2d² + 4·T·d + 16d²), and the backward pass twice that,
except for the rule's own products, which recompute some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polyak.checks import check_whole
from polyak.errors import ConfigError
from polyak.nn.config import ModelConfig

if TYPE_CHECKING:
    from polyak.nn.placement import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a model costs; FLOPs per token at sequences of `context_length` tokens.

    They are rounded where a sequence ends in a shorter chunk of attention and its FLOPs are no
    multiple of its tokens.

    All numbers leave dropout out. Compare models within one column: an elementwise element and a
    FLOP of a matrix product take very different times.
    """

    parameters: dict[str, int] = field(hash=False)
    """Parameters by group: `tokens` and `positions` (x's tables), `streams` (tables of auxiliary
    streams, or the gains with which they start from x, and what is reinjected), `attention` and
    `mlp` (their matrices and biases), `norms` (in front of the oracles and the head, and of queries
    and keys), `rule` (its scalars and norms), `output` (0 when tied to `tokens`)."""
    forward_flops_per_token: int
    """Matrix products of the forward pass, in FLOPs."""
    backward_flops_per_token: int
    """Matrix products of the backward pass."""
    decoding_flops_per_token: int
    """Matrix products of one more token, given the keys and values, or states, of those before."""
    elementwise_per_token: int
    """Elements written by arithmetic outside matrix products and what a kind of attention does
    with queries, keys and values (a kernel, or chunks), forward pass, with every op in its
    reference form (`polyak.rules._cost.ElementCounter`): norms, the MLP's non-linearity, rotary
    positions, the rule, sums of embeddings. Tables of positions, which a batch shares, are left
    out."""
    state_bytes_per_token: int
    """Bytes of what one token carries from layer to layer: x and the rule's streams."""
    bytes_per_number: int
    """Bytes of one number of that state: 4 for float32."""

    @property
    def training_flops_per_token(self) -> int:
        """Matrix products of the forward and backward passes, in FLOPs."""
        return self.forward_flops_per_token + self.backward_flops_per_token

    @property
    def total_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(self.parameters.values())


def cost(config: ModelConfig, *, position: int | None = None, bytes_per_number: int = 4) -> Cost:
    """What the model of `config` costs.

    Args:
        config: the model.
        position: place in the sequence, from 0, of the token whose decoding is counted; default
            the last of the context. A model that is not causal cannot keep keys and values, so
            its decoding is a whole forward pass over `position` + 1 tokens.
        bytes_per_number: size of one number of the state carried through depth.

    Raises:
        ConfigError: `position` is outside the context, or `bytes_per_number` below 1.
        RuleError: the rule declares no cost and its step fails when run to measure it.
        AttentionError: the same of a kind of attention.
    """
    from polyak.nn.attention._cost import sequence_flops, token_flops
    from polyak.nn.placement import placement_of, start_of
    from polyak.rules._cost import norm_elements

    last = config.context_length - 1
    position = last if position is None else position
    if not 0 <= position <= last:
        raise ConfigError(f"position={position} must be from 0 to {last}, the end of the context")
    check_whole("bytes_per_number", bytes_per_number)
    placement, d = placement_of(config), config.stream_width
    costs = {id(placed): placed.step_cost(config) for placed in placement.parts}
    steps = [(substep, costs[id(placed)]) for substep, placed in placement.steps()]
    # a step on both oracles is one of a "layer"
    to_attention = sum(cost.oracle_calls for substep, cost in steps if substep != "mlp")
    to_mlp = sum(cost.oracle_calls for substep, cost in steps if substep != "attention")
    to_both = sum(cost.oracle_calls for substep, cost in steps if substep == "layer")
    starts = [start_of(stream, config) for stream in placement.streams]
    rule_forward = sum(cost.forward_flops for _, cost in steps)

    matrices = to_attention * _attention_matrices(config) + to_mlp * _mlp_matrices(config)
    rest, tokens = 2 * matrices + 2 * d * config.vocab_size, config.context_length
    inside = sequence_flops(config, tokens)
    if config.causal:
        decoding = to_attention * token_flops(config, position + 1) + rest + rule_forward
    else:
        again = (rest + rule_forward) * (position + 1)
        decoding = again + to_attention * sequence_flops(config, position + 1)[0]
    norm = norm_elements(config.norm, d, config.bias)
    state = d + sum(_numbers(s.shape(d, config.num_heads)) for s in placement.streams)
    return Cost(
        parameters=_parameters(config, placement, starts),
        forward_flops_per_token=rest + rule_forward + _share(to_attention * inside[0], tokens),
        backward_flops_per_token=2 * rest
        + sum(cost.backward_flops for _, cost in steps)
        + _share(to_attention * inside[1], tokens),
        decoding_flops_per_token=decoding,
        elementwise_per_token=_starts(config, starts)
        # a pre-norm is taken whenever an oracle is called, a post-norm once a step
        + norm * (to_attention + to_mlp if config.norm_position == "pre" else 2 * config.num_layers)
        + to_attention * _inside_attention(config)
        + to_mlp * _inside_mlp(config)
        + to_both * d  # attention + MLP
        + sum(cost.elements for _, cost in steps)
        + norm,
        state_bytes_per_token=state * bytes_per_number,
        bytes_per_number=bytes_per_number,
    )


def _share(flops: int, tokens: int) -> int:
    """One token's part of a sequence's, to the nearest whole number."""
    return (2 * flops + tokens) // (2 * tokens)


def _starts(config: ModelConfig, starts: Sequence[str]) -> int:
    """Elements written where x and streams start, and where a table is added to x in each layer."""
    from polyak.rules._cost import norm_elements

    d = config.stream_width
    if config.positions == "sinusoidal":
        written = d * (config.position_mix == "added")
    else:
        written = (1 + starts.count("embedding")) * d * (config.positions == "learned")
    written += starts.count("x") * norm_elements(config.norm, d)
    if config.embedding_norm != "none":  # without a gain
        written += norm_elements(config.embedding_norm, d) - d
    if config.embedding_reinjection:
        written += norm_elements(config.norm, d) - d + 2 * d * config.num_layers
    return written


def _attention_matrices(config: ModelConfig) -> int:
    """Entries of attention's matrices, each met once by a token."""
    return (config.qkv_width + config.heads_width) * config.stream_width


def _mlp_matrices(config: ModelConfig) -> int:
    """Entries of the MLP's matrices, each met once by a token."""
    return (3 if config.mlp == "gated" else 2) * config.stream_width * config.hidden_width


def _inside_mlp(config: ModelConfig) -> int:
    """Elements that the MLP writes behind its pre-norm: activation, product."""
    return config.hidden_width * (2 if config.mlp == "gated" else 1)


def _inside_attention(config: ModelConfig) -> int:
    """Elements that attention writes behind its pre-norm."""
    from polyak.rules._cost import norm_elements

    heads, head_dim = config.num_heads + config.kv_heads, config.head_width
    inside = 0
    if config.positions == "rope":
        inside += 3 * heads * head_dim  # four half products, two half sums
    if config.qk_norm:
        inside += heads * norm_elements(config.norm, head_dim)
    return inside


def _parameters(config: ModelConfig, placement: Placement, starts: Sequence[str]) -> dict[str, int]:
    import torch

    from polyak.nn.attention._cost import parameters

    with torch.device("meta"):  # a user's rule may hold any parameters
        made = {id(placed): placed.make(config) for placed in placement.parts}
    own = {key: sum(p.numel() for p in rule.parameters()) for key, rule in made.items()}
    d, layers, bias, width = (
        config.stream_width,
        config.num_layers,
        config.bias,
        config.hidden_width,
    )
    qkv_bias = bias if config.qkv_bias is None else config.qkv_bias
    affine = 1 + (bias and config.norm == "layer")
    positions = config.context_length * (config.positions == "learned")
    up = 2 if config.mlp == "gated" else 1
    return {
        "tokens": config.vocab_size * config.token_width,
        "positions": positions * d,
        "streams": starts.count("embedding") * (config.vocab_size + positions) * d
        + starts.count("x") * d
        + layers * config.embedding_reinjection,
        "attention": layers
        * ((config.qkv_width + config.heads_width) * d + qkv_bias * config.qkv_width + bias * d)
        if config.attention == "softmax"
        else parameters(config),
        "mlp": layers * ((up + 1) * d * width + bias * (up * width + d)),
        "norms": (2 * layers + 1) * d * affine + config.qk_norm * 2 * layers * config.head_width,
        "rule": sum(own[id(placed)] for _, placed in placement.steps()),
        "output": 0 if config.tie_embeddings else config.vocab_size * d,
    }


def _numbers(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
