"""What the fields of a backbone must be to go together. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from polyak.checks import check_whole
from polyak.errors import ConfigError

# Far above any model: what a file names is looked at before it is listed or allocated.
MOST = {
    "num_layers": 10_000,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "d_model": 2**20,
    "head_dim": 2**20,
    "mlp_width": 2**24,
    "vocab_size": 2**31 - 1,
    "context_length": 2**31 - 1,
}


def check_backbone(config: Any) -> None:
    """Refuse a `ModelConfig` whose backbone cannot be built.

    Raises:
        ConfigError: a field, or two that do not go together; the message has the fix.
    """
    for name in ("num_kv_heads", "head_dim", "mlp_width"):
        check_whole(name, getattr(config, name), optional=True, most=MOST[name])
    if config.num_heads % config.kv_heads:
        divisors = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
        raise ConfigError(
            f"num_kv_heads={config.num_kv_heads} does not divide num_heads={config.num_heads}; "
            f"use one of {', '.join(map(str, divisors))}"
        )
    if config.qkv_bias is not None and not isinstance(config.qkv_bias, bool):
        raise ConfigError(f"qkv_bias={config.qkv_bias!r} must be true, false or none")
    theta = config.rope_theta
    number = isinstance(theta, int | float) and not isinstance(theta, bool)
    if not number or not 0 < theta < math.inf:
        raise ConfigError(f"rope_theta={theta!r} must be a number above 0")
    if config.positions == "rope" and config.head_width % 2:
        raise ConfigError(
            f"positions='rope' turns pairs of dimensions, but head_dim={config.head_dim} is odd; "
            "use an even one"
            if config.head_dim is not None
            else f"positions='rope' turns pairs of dimensions, but d_model/num_heads = "
            f"{config.head_width} is odd; use a d_model that is a multiple of "
            f"{2 * config.num_heads}"
        )
    if config.rope_scaling is not None:
        _check_scaling(config, config.rope_scaling)
    if config.positions != "rope" and theta != 10000.0:
        raise ConfigError(
            f"rope_theta={theta!r} needs positions='rope', and positions are "
            f"{config.positions!r}; set positions, or leave rope_theta out"
        )
    if config.norm_position == "post" and config.splitting == "simultaneous":
        raise ConfigError(
            "norm_position='post' norms x after the step on each oracle, and "
            "splitting='simultaneous' takes one step on both; use splitting='lie_trotter'"
        )
    _check_sinusoids(config)


def _check_sinusoids(config: Any) -> None:
    if config.positions != "sinusoidal":
        if config.position_mix != "added":
            raise ConfigError(
                f"position_mix={config.position_mix!r} needs positions='sinusoidal', and "
                f"positions are {config.positions!r}; set them, or leave position_mix out"
            )
    elif config.position_mix == "added":
        if config.stream_width % 2:
            raise ConfigError(
                "positions='sinusoidal' are pairs of a sine and a cosine, but "
                f"{_width(config)} is odd; use an even one"
            )
    elif config.stream_width % 4:
        raise ConfigError(
            f"position_mix='concatenated' makes half of {_width(config).partition('=')[0]} pairs "
            f"of a sine and a cosine, but {_width(config)} is no multiple of 4; use one"
        )
    elif config.tie_embeddings:
        raise ConfigError(
            "tie_embeddings=True: with position_mix='concatenated' the token table has half "
            "of d_model, and the output matrix all of it; set tie_embeddings=false"
        )


def _width(config: Any) -> str:
    """The field that sets the residual stream's width, with its value."""
    name = "d_model" if config.residual_width is None else "residual_width"
    return f"{name}={config.stream_width}"


def _check_scaling(config: Any, scaling: Any) -> None:
    if config.positions != "rope":
        raise ConfigError(
            f"rope_scaling={scaling!r} needs positions='rope'; set them, or leave it out"
        )
    values = tuple(scaling) if isinstance(scaling, list | tuple) else ()
    numbers = all(isinstance(v, int | float) and 0 < v < math.inf for v in values)
    rising = len(values) == 4 and numbers and values[1] < values[2]
    if not (rising or (len(values) == 1 and numbers)):
        raise ConfigError(
            f"rope_scaling={scaling!r} must be four numbers above 0: factor, low and high "
            "frequency factor (low below high), first context, such as 8+1+4+8192; or one "
            "factor for all wavelengths, such as (4,)"
        )
