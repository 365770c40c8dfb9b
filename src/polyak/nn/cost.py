r"""What a model costs: parameters, FLOPs, elementwise work and state, from its configuration.

Matrix products are counted as `torch.utils.flop_counter.FlopCounterMode` counts them on the meta
device, 2mnk each. Attention is the full T² square, causal or not, and its backward pass four
products: on the meta device it runs as plain matrix products. (A flash kernel computes the scores
once more in backward and may skip the masked half.) The one formula torch lacks, of an in-place
`baddbmm_`, is registered by `polyak.rules._cost`.
With T the context length, d the width and V the vocabulary, one token's forward pass takes

    layers · (2dD(2H + 2H_kv) + 4·T·H·D + 2m·d·w) + 2dV + the rule's own products,

with H heads of D dimensions, H_kv of them for keys and values, and m matrices of the MLP, of width
w (in the paper's models, H·D = d: 2·3d² + 2d² + 4·T·d + 16d²), and the backward pass twice that,
except for the rule's own products, which recompute some.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from polyak.checks import check_whole
from polyak.errors import ConfigError
from polyak.nn.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a model costs; FLOPs per token at sequences of `context_length` tokens.

    All numbers leave dropout out. Compare models within one column: an elementwise element and a
    FLOP of a matrix product take very different times.
    """

    parameters: dict[str, int] = field(hash=False)
    """Parameters by group: `tokens` and `positions` (x's tables), `streams` (tables of auxiliary
    streams), `attention` and `mlp` (their matrices and biases), `norms` (in front of the oracles
    and the head, and of queries and keys), `rule` (its scalars and norms), `output` (0 when tied
    to `tokens`)."""
    forward_flops_per_token: int
    """Matrix products of the forward pass, in FLOPs."""
    backward_flops_per_token: int
    """Matrix products of the backward pass."""
    decoding_flops_per_token: int
    """Matrix products of one more token, given the keys and values of those before it."""
    elementwise_per_token: int
    """Elements written by arithmetic outside matrix products and the attention kernel, forward
    pass, with every op in its reference form (`polyak.rules._cost.ElementCounter`): norms, the
    MLP's non-linearity, rotary positions, the rule, sums of embeddings. Tables of positions, which
    a batch shares, are left out."""
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
    """
    from polyak import rules
    from polyak.nn.splitting import SUBSTEPS
    from polyak.rules._cost import norm_elements, step_cost

    last = config.context_length - 1
    position = last if position is None else position
    if not 0 <= position <= last:
        raise ConfigError(f"position={position} must be from 0 to {last}, the end of the context")
    check_whole("bytes_per_number", bytes_per_number)
    rule = rules.get(config.rule)
    step = step_cost(
        rule,
        config.d_model,
        config.num_heads,
        norm_eps=config.norm_eps,
        bias=config.bias,
        norm_kind=config.norm,
        options=config.rule_options,
    )
    d, layers = config.d_model, config.num_layers
    substeps = layers * len(SUBSTEPS[config.splitting])
    # under either splitting, every call of the rule's oracle calls attention and MLP once a layer
    calls = layers * step.oracle_calls
    tables = sum(s.start == "embedding" and config.stream_start is None for s in rule.streams)

    def forward(keys: int) -> int:
        oracles = 2 * _matrices(config) + 4 * keys * config.heads_width
        return calls * oracles + substeps * step.forward_flops + 2 * d * config.vocab_size

    rule_forward, total_forward = substeps * step.forward_flops, forward(config.context_length)
    norm = norm_elements(config.norm, d, config.bias)
    both = d if config.splitting == "simultaneous" else 0  # attention + MLP
    decoding = forward(position + 1) * (1 if config.causal else position + 1)
    state = d + sum(_numbers(s.shape(d, config.num_heads)) for s in rule.streams)
    return Cost(
        parameters=_parameters(config, tables),
        forward_flops_per_token=total_forward,
        backward_flops_per_token=2 * (total_forward - rule_forward)
        + substeps * step.backward_flops,
        decoding_flops_per_token=decoding,
        elementwise_per_token=_starts(config, tables)
        # a pre-norm is taken whenever an oracle is called, a post-norm once a step
        + (calls if config.norm_position == "pre" else layers) * 2 * norm
        + calls * (_inside_oracles(config) + both)
        + substeps * step.elements
        + norm,
        state_bytes_per_token=state * bytes_per_number,
        bytes_per_number=bytes_per_number,
    )


def _starts(config: ModelConfig, tables: int) -> int:
    """Elements that are added to tokens where x and streams start."""
    if config.positions == "sinusoidal":
        return config.d_model * (config.position_mix == "added")
    return (1 + tables) * config.d_model * (config.positions == "learned")


def _matrices(config: ModelConfig) -> int:
    """Entries of a layer's matrices, each met once by a token."""
    d = config.d_model
    mlp = 3 if config.mlp == "gated" else 2
    return (config.qkv_width + config.heads_width) * d + mlp * d * config.hidden_width


def _inside_oracles(config: ModelConfig) -> int:
    """Elements that attention and MLP write behind their pre-norms."""
    from polyak.rules._cost import norm_elements

    heads, head_dim = config.num_heads + config.kv_heads, config.head_width
    inside = config.hidden_width * (2 if config.mlp == "gated" else 1)  # activation, product
    if config.positions == "rope":
        inside += 3 * heads * head_dim  # four half products, two half sums
    if config.qk_norm:
        inside += heads * norm_elements(config.norm, head_dim)
    return inside


def _parameters(config: ModelConfig, tables: int) -> dict[str, int]:
    import torch

    from polyak import rules
    from polyak.nn.splitting import SUBSTEPS

    with torch.device("meta"):  # a user's rule may hold any parameters
        rule = rules.get(config.rule)(
            config.d_model,
            config.num_heads,
            bias=config.bias,
            norm_kind=config.norm,
            options=config.rule_options,
        )
    d, layers, bias, width = config.d_model, config.num_layers, config.bias, config.hidden_width
    qkv_bias = bias if config.qkv_bias is None else config.qkv_bias
    affine = 1 + (bias and config.norm == "layer")
    positions = config.context_length * (config.positions == "learned")
    substeps = layers * len(SUBSTEPS[config.splitting])
    up = 2 if config.mlp == "gated" else 1
    return {
        "tokens": config.vocab_size * config.token_width,
        "positions": positions * d,
        "streams": tables * (config.vocab_size + positions) * d,
        "attention": layers
        * ((config.qkv_width + config.heads_width) * d + qkv_bias * config.qkv_width + bias * d),
        "mlp": layers * ((up + 1) * d * width + bias * (up * width + d)),
        "norms": (2 * layers + 1) * d * affine + config.qk_norm * 2 * layers * config.head_width,
        "rule": substeps * sum(parameter.numel() for parameter in rule.parameters()),
        "output": 0 if config.tie_embeddings else config.vocab_size * d,
    }


def _numbers(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
