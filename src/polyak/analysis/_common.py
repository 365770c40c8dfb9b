"""What every analysis needs: plain attention, checks of model and tokens, flat vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyak.errors import ConfigError, DataError

CAUSAL_TOLERANCE = 1e-4
"""Largest change of earlier logits, relative to their size, when the last token changes."""


def math_attention() -> AbstractContextManager[Any]:
    """Softmax attention as plain matrix products inside the context.

    The fast CPU and CUDA kernels have neither a double backward nor forward-mode derivatives.
    """
    kernel: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
    return kernel


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Logits (B, T, vocab) of a model that returns them, or an object with `.logits`.

    Raises:
        ConfigError: the model returns something else.
    """
    return as_logits(model(input_ids), input_ids, type(model).__name__)


def as_logits(output: Any, input_ids: Tensor, name: str) -> Tensor:
    """What a model returned as logits (B, T, vocab); see `logits_of`."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != input_ids.shape:
        raise ConfigError(
            f"{name} is not a causal language model: it must return logits of shape (batch, time, "
            "vocabulary), or an object that holds them as .logits"
        )
    return logits


def check_tokens(ids: Tensor) -> None:
    """See that there is something to look at.

    Args:
        ids: (N, T+1) integers: inputs [:, :-1], targets [:, 1:].

    Raises:
        DataError: no tokens, or of another shape or type.
    """
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(f"tokens must be integers of shape (N, T+1), not {tuple(ids.shape)}")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise DataError(
            f"no tokens to look at: shape {tuple(ids.shape)} holds no target; give at least one "
            "sequence of two tokens"
        )


def check_model(model: nn.Module, ids: Tensor) -> None:
    """Refuse what would make the numbers meaningless.

    Args:
        model: called with (B, T) ids.
        ids: (N, T+1) integers.

    Raises:
        ConfigError: dropout is on, two evaluations differ, the model is not causal, or its logits
            are not finite.
        DataError: a token id that the model does not know, or no tokens.
    """
    check_tokens(ids)
    if any(_drops(module) for module in model.modules()):
        raise ConfigError("dropout is on: the model is in training mode; call model.eval() first")
    row = ids[:1, :-1]
    with torch.no_grad(), math_attention():
        try:
            first, second = logits_of(model, row), logits_of(model, row)
        except IndexError:
            raise DataError(
                f"token id {int(ids.max())} is outside the model's tables; the tokens must come "
                "from the model's own tokenizer"
            ) from None
        if int(ids.max()) >= first.shape[-1] or int(ids.min()) < 0:
            raise DataError(
                f"token ids from {int(ids.min())} to {int(ids.max())} do not fit the model's "
                f"vocabulary of {first.shape[-1]}; the tokens must come from its own tokenizer"
            )
        if not bool(torch.isfinite(first).all()):
            raise ConfigError("the model's logits are not finite; it has diverged")
        if not torch.equal(first, second):
            raise ConfigError(
                "the model is not deterministic: two evaluations of the same tokens differ; "
                "switch off whatever draws random numbers"
            )
        if row.shape[1] < 2:
            return
        other = row.clone()
        other[:, -1] = (other[:, -1] + 1) % first.shape[-1]
        change = (logits_of(model, other) - first)[:, :-1].abs().max()
    if float(change) > CAUSAL_TOLERANCE * max(1.0, float(first.abs().max())):
        raise ConfigError(
            "the model is not causal: changing the last token changes earlier logits; this "
            "analysis is for next-token models"
        )


def _drops(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    rates = (getattr(module, name, 0.0) for name in ("dropout", "activation_dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


class FlatView:
    """Chosen parameters as one vector: tied weights once, in the order the model names them.

    Args:
        model: any module.
        names: of the parameters; None for all that are trained.

    Raises:
        ConfigError: a name is unknown, or nothing is chosen.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        known = dict(model.named_parameters())
        if names is None:
            names = [name for name, parameter in known.items() if parameter.requires_grad]
        for name in names:
            if name not in known:
                raise ConfigError(f"the model has no parameter {name!r} (tied weights have one)")
        if not names:
            raise ConfigError("no parameters to look at: none is chosen, or none is trained")
        self.names = list(names)
        self.shapes = {name: known[name].shape for name in self.names}
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Tensors by name → one vector."""
        return torch.cat([values[name].reshape(-1) for name in self.names])

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """Tensors in the view's order → one vector."""
        return torch.cat([value.reshape(-1) for value in values])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """One vector → views of it by name.

        Raises:
            ConfigError: the vector has another length.
        """
        if vector.shape != (self.size,):
            raise ConfigError(f"a vector of shape {tuple(vector.shape)} does not fit {self.size}")
        parts = torch.split(vector, [shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Each name with its place in the vector."""
        start = 0
        for name, shape in self.shapes.items():
            yield name, slice(start, start + shape.numel())
            start += shape.numel()
