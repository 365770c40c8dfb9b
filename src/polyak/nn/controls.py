"""What the controls of a model's start and width must be to work. Imports no torch."""

from __future__ import annotations

from typing import Any

from polyak.checks import check_number
from polyak.errors import ConfigError

REINJECTED = "reinjected"
"""The stream of `embedding_reinjection`: its table's vectors, normed, which no rule moves."""


def check_controls(config: Any) -> None:
    """Refuse a `ModelConfig` whose controls cannot work.

    Raises:
        ConfigError: a field is out of range; the message has the fix.
    """
    start, width, heads = config.stream_start, config.residual_width, config.num_heads
    if start not in (None, "zeros", "x"):
        raise ConfigError(f"stream_start={start!r} must be 'zeros', 'x' or left out")
    if width is not None and width % heads:
        raise ConfigError(
            f"residual_width={width} is no multiple of num_heads={heads}, and rules may see a "
            f"token as one row a head; use {max(1, round(width / heads)) * heads}"
        )
    if config.embedding_std is not None:
        check_number("embedding_std", config.embedding_std, above=True)
