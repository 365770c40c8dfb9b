"""What a rule declares of its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCost:
    """What one call of `step` costs per token, the oracles' own work apart.

    Attributes:
        elements: elementwise work, in elements written (forward, reference forms).
        forward_flops: matrix products of the forward pass, in FLOPs.
        backward_flops: matrix products of the backward pass, including recomputed ones.
        oracle_calls: how often it calls the oracle.
    """

    elements: int
    forward_flops: int = 0
    backward_flops: int = 0
    oracle_calls: int = 1


@dataclass(frozen=True)
class Work:
    """A rule's declaration of its cost.

    Attributes:
        passes: elementwise passes over a token's vector of d numbers, as the equation is written:
            x + νv is two (the product, the sum), βv + γg three. Leave out the rule's norms, and
            scalars that exist only with a norm (one pass each); both are added where they exist.
        matrices: (heads, head_dim) → what the rule does on a token's matrix, beyond `passes`.
    """

    passes: int
    matrices: Callable[[int, int], StepCost] | None = None
