r"""What a model costs: parameters, FLOPs, elementwise work and state, from its configuration.

Matrix products are counted as `torch.utils.flop_counter.FlopCounterMode` counts them on the meta
device, 2mnk each. Attention is the full T² square, causal or not, and its backward pass four
products: on the meta device it runs as plain matrix products. (A flash kernel computes the scores
once more in backward and may skip the masked half.) The one formula torch lacks, of an in-place
`baddbmm_`, is registered by `polyak.rules._cost`.
With T the context length, d the width and V the vocabulary, one token's forward pass takes

    layers · (2·3d² + 2·d² + 4·T·d + 16d²) + 2dV + the rule's own products,

and the backward pass twice that, except for the rule's own products, which recompute some.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    and the head), `rule` (its scalars and norms), `output` (0 when tied to `tokens`)."""
    forward_flops_per_token: int
    """Matrix products of the forward pass, in FLOPs."""
    backward_flops_per_token: int
    """Matrix products of the backward pass."""
    decoding_flops_per_token: int
    """Matrix products of one more token, given the keys and values of those before it."""
    elementwise_per_token: int
    """Elements written by arithmetic outside matrix products and the attention kernel, forward
    pass, with every op in its reference form (`polyak.rules._cost.ElementCounter`): norms, GELU,
    the rule, sums of embeddings."""
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
    from polyak.rules._cost import layer_norm_elements, step_cost

    last = config.context_length - 1
    position = last if position is None else position
    if not 0 <= position <= last:
        raise ConfigError(f"position={position} must be from 0 to {last}, the end of the context")
    if bytes_per_number < 1:
        raise ConfigError(f"bytes_per_number={bytes_per_number} must be at least 1")
    rule = rules.get(config.rule)
    step = step_cost(
        rule,
        config.d_model,
        config.num_heads,
        norm_eps=config.norm_eps,
        bias=config.bias,
        options=config.rule_options,
    )
    d, layers = config.d_model, config.num_layers
    substeps = layers * len(SUBSTEPS[config.splitting])
    # under either splitting, every call of the rule's oracle calls attention and MLP once a layer
    calls = layers * step.oracle_calls
    tables = sum(s.start == "embedding" and config.stream_start is None for s in rule.streams)

    def forward(keys: int) -> int:
        oracles = 8 * d * d + 4 * keys * d + 16 * d * d
        return calls * oracles + substeps * step.forward_flops + 2 * d * config.vocab_size

    rule_forward, total_forward = substeps * step.forward_flops, forward(config.context_length)
    norm = layer_norm_elements(d, config.bias)
    both = d if config.splitting == "simultaneous" else 0  # attention + MLP
    decoding = forward(position + 1) * (1 if config.causal else position + 1)
    state = d + sum(_numbers(s.shape(d, config.num_heads)) for s in rule.streams)
    return Cost(
        parameters=_parameters(config, tables),
        forward_flops_per_token=total_forward,
        backward_flops_per_token=2 * (total_forward - rule_forward)
        + substeps * step.backward_flops,
        decoding_flops_per_token=decoding,
        elementwise_per_token=(1 + tables) * d  # token + position vectors
        + calls * (2 * norm + 4 * d + both)  # pre-norms, GELU
        + substeps * step.elements
        + norm,
        state_bytes_per_token=state * bytes_per_number,
        bytes_per_number=bytes_per_number,
    )


def _parameters(config: ModelConfig, tables: int) -> dict[str, int]:
    import torch

    from polyak import rules
    from polyak.nn.splitting import SUBSTEPS

    with torch.device("meta"):  # a user's rule may hold any parameters
        rule = rules.get(config.rule)(
            config.d_model, config.num_heads, bias=config.bias, options=config.rule_options
        )
    d, layers, bias = config.d_model, config.num_layers, int(config.bias)
    substeps = layers * len(SUBSTEPS[config.splitting])
    return {
        "tokens": config.vocab_size * d,
        "positions": config.context_length * d,
        "streams": tables * (config.vocab_size + config.context_length) * d,
        "attention": layers * (4 * d * d + bias * 4 * d),
        "mlp": layers * (8 * d * d + bias * 5 * d),
        "norms": (2 * layers + 1) * (1 + bias) * d,
        "rule": substeps * sum(parameter.numel() for parameter in rule.parameters()),
        "output": 0 if config.tie_embeddings else config.vocab_size * d,
    }


def _numbers(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
