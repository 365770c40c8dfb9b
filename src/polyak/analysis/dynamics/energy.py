r"""Does attention's step raise the interaction energy that it is said to ascend?

    E_ih(y) = Σ_{j ≤ i} exp(q_i·k_j/√D),   S(y) = Σ_ih ln E_ih,

of token i and head h, with the layer's own queries and keys at y. With tied weights
(W_q = W_k = W_v = W_oᵀ) unmasked attention without its denominator is ∇½ΣE; trained weights are not
tied, so this asks whether they behave as if. Along the actual update u = x_{s+1} − x_s:

    rise      ln E_ih(y + u) − ln E_ih(y), averaged over tokens and heads,
    rising    share of (token, head) at which it is above 0,
    cosine    cos(u_i, ∂S/∂y_i),

and the same along random directions r with ‖r_i‖ = ‖u_i‖ for every token. Attention *ascends* this
energy; the code adds the oracle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polyak.analysis._common import math_attention
from polyak.analysis.dynamics.asymmetry import Field
from polyak.analysis.dynamics.field import check_oracles
from polyak.analysis.dynamics.path import cosine
from polyak.analysis.dynamics.summaries import Summary, check_sequences, summary
from polyak.analysis.dynamics.trajectory import Watched
from polyak.errors import ConfigError

DRAWS = 4
"""Random directions whose mean is the null."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Numbers of every attention substep, by `POINT/WHICH/NAME`.

    WHICH is `update`, `random`, or `excess`, the first less the second, by pairs; NAME is `rise`,
    `rising` or `cosine`.
    """

    labels: tuple[str, ...]
    numbers: dict[str, Summary]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "labels": list(self.labels),
            "numbers": {name: one.to_dict() for name, one in self.numbers.items()},
        }


def applies(watched: Watched) -> str | None:
    """Why there is no such energy; None where there is."""
    kind = watched.model.config.attention if watched.ours else None
    if kind == "softmax":
        return None
    why = "plain blocks are not taken apart" if kind is None else f"attention={kind}"
    return f"energy is of softmax attention in polyak's models, and does not apply here ({why})"


def energy(watched: Watched, ids: Tensor, *, seed: int = 0) -> Energy:
    """The energy's change along every step that asks attention, beside random directions.

    Args:
        watched: the model.
        ids: (N, T) inputs, N ≥ 2.
        seed: of the random directions.

    Raises:
        ConfigError: attention is no softmax, or the model a plain one; see `Watched`.
        DataError: one sequence.
    """
    if (reason := applies(watched)) is not None:
        raise ConfigError(reason)
    check_oracles(watched)
    check_sequences(ids)
    generator = torch.Generator().manual_seed(seed)
    made = watched.run(ids)
    numbers: dict[str, Summary] = {}
    for place, (substep, update) in enumerate(
        zip(made.substeps, made.updates, strict=True), start=1
    ):
        if substep.kind == "mlp":
            continue
        start = substep.points[0]
        below, slope = log_energies(substep.oracle, start), ascent(substep.oracle, start)

        def along(
            step: Tensor,
            oracle: Field = substep.oracle,
            start: Tensor = start,
            below: Tensor = below,
            slope: Tensor = slope,
        ) -> dict[str, Tensor]:
            rise = log_energies(oracle, start + step) - below
            return {
                "rise": rise.mean(1),
                "rising": (rise > 0).double().mean(1),
                "cosine": cosine(step, slope),
            }

        own = along(update)
        draws = [along(_as_long(update, generator)) for _ in range(DRAWS)]
        null = {name: torch.stack([one[name] for one in draws]).mean(0) for name in own}
        for name, value in own.items():
            for which, values in (
                ("update", value),
                ("random", null[name]),
                ("excess", value - null[name]),
            ):
                numbers[f"{place}/{which}/{name}"] = summary(values.double().cpu())
    return Energy(labels=tuple(watched.labels), numbers=numbers)


def log_energies(oracle: Field, y: Tensor) -> Tensor:
    """ln E_ih at y (B, T, d): (B, H, T)."""
    calls = _Scores()
    with math_attention(), calls:
        oracle(y)
    return calls.found[0]


def ascent(oracle: Field, y: Tensor) -> Tensor:
    """∂S/∂y, (B, T, d)."""
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        (found,) = torch.autograd.grad(log_energies(oracle, at).sum(), at)
    return found


class _Scores(TorchFunctionMode):
    """Gathers ln Σ_j exp(q_i·k_j/√D) of every call of softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            self.found.append(scores.masked_fill(later, -math.inf).logsumexp(-1))
        return func(*args, **kwargs)


def _as_long(update: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of every token, as long as its update."""
    drawn = torch.randn(update.shape, generator=generator, dtype=torch.float64).to(update)
    lengths: Tensor = update.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
    return drawn * lengths
