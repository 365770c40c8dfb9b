r"""The loss as a function of one vector of weights, with its gradient and curvature products.

L(θ) = mean cross-entropy in nats over fixed tokens, n = N·T targets. Products are exact, by
reverse mode over reverse mode:

    Hv = ∇_θ (∇L · v),        Gv = Jᵀ S J v,   S = (diag p − p pᵀ)/n per token,

with J the Jacobian of the logits and p = softmax(logits). G is the Gauss–Newton part: H = G + Σ
(∂L/∂z)·∇²z, and G is positive semi-definite. J v itself is taken by differentiating u ↦ Jᵀu.

The graph of the gradient is kept between products as long as it fits into memory, which halves
their cost: a product is then one backward pass through it. Forward over reverse
(`jvp` of `grad`) was measured at twice the time of the kept graph and a third more than a graph
that is built anew, and not every model of others supports it (docs/analysis-sharpness.md).
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from polyak.analysis._common import FlatView, as_logits, check_model, math_attention
from polyak.checks import check_whole
from polyak.errors import ConfigError

Kind = Literal["hessian", "gauss_newton"]
Operator = Callable[[Tensor], Tensor]
TOKENS_AT_ONCE = 2048
"""Targets in a micro-batch, if the caller says nothing."""
KEPT_BYTES = 4 << 30
"""Largest graph of a gradient that is kept between products, if the caller says nothing."""


class Surface:
    """L on fixed tokens as a function of chosen parameters; the model is copied, never changed.

    Vectors that go in and come out are flat, float64, in the order of `view`; arithmetic on the
    model is in `dtype`.

    Args:
        model: any module that maps ids (B, T) to logits, or to an object with `.logits`.
        ids: (N, T+1) integers: inputs [:, :-1], targets [:, 1:].
        names: of the parameters that vary; None for all that are trained.
        dtype: float32 or float64.
        rows: sequences in a micro-batch; None for as many as make about 2,048 targets.
        kept_bytes: memory for graphs that are kept between products.
        checked: skip `check_model`, for a model that was checked already.

    Raises:
        ConfigError, DataError: see `check_model` and `FlatView`.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        names: Sequence[str] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        rows: int | None = None,
        kept_bytes: int = KEPT_BYTES,
        checked: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype={dtype} must be float32 or float64")
        check_whole("rows", rows, optional=True)
        if not checked:
            check_model(model, ids)
        self.view = FlatView(model, names)
        self.model = copy.deepcopy(model).to(dtype)
        parameters = dict(self.model.named_parameters())
        self.device = next(iter(parameters.values())).device
        self.dtype = dtype
        self.ids = ids.to(self.device)
        self.tokens = self.ids[:, 1:].numel()
        rows = rows or max(1, TOKENS_AT_ONCE // (self.ids.shape[1] - 1))
        self.batches = torch.split(self.ids, rows)
        self.products = 0
        """Curvature products made so far."""
        self.on_work: Callable[[float], None] | None = None
        """Called after a curvature product with 1, a gradient with ½, a loss with ⅙: their share of
        matrix products, for progress bars."""
        self._kept_bytes = kept_bytes
        self._kept: dict[Kind, list[_Graph]] = {}
        self._fixed = {
            name: parameter.detach()
            for name, parameter in parameters.items()
            if name not in self.view.shapes
        }
        self._leaves = {
            name: parameters[name].detach().clone().requires_grad_() for name in self.view.names
        }

    @property
    def size(self) -> int:
        """N, the number of parameters that vary."""
        return self.view.size

    @property
    def weights(self) -> Tensor:
        """θ as a float64 vector."""
        return self.view.flatten({k: v.detach() for k, v in self._leaves.items()}).double()

    def loss(self, shift: Tensor | None = None) -> float:
        """L(θ + shift); the tokens' losses are added up in float64.

        Raises:
            ConfigError: it is not finite at θ itself.
        """
        values = self._values(shift)
        total = 0.0
        with torch.no_grad(), math_attention():
            for batch in self.batches:
                losses = self._losses(values, batch, "none")
                total += float(losses.double().sum())
        self._worked(1 / 6)
        mean = total / self.tokens
        if shift is None and not math.isfinite(mean):
            raise ConfigError("the model's loss is not finite; it has diverged")
        return mean

    def gradient(self, shift: Tensor | None = None) -> Tensor:
        """∇L(θ + shift)."""
        values = {k: v.detach().requires_grad_() for k, v in self._values(shift).items()}
        result = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        with math_attention():
            for batch in self.batches:
                loss = self._losses(values, batch, "sum") / self.tokens
                result += self._joined(_gradients(loss, list(values.values())))
        self._worked(1 / 2)
        return result

    def hessian(self, vector: Tensor) -> Tensor:
        """Hv.

        Raises:
            ConfigError: it is not finite.
        """
        return self._product("hessian", vector)

    def gauss_newton(self, vector: Tensor) -> Tensor:
        """Gv.

        Raises:
            ConfigError: it is not finite.
        """
        return self._product("gauss_newton", vector)

    def operator(self, kind: Kind) -> Operator:
        """The product by name."""
        return self.hessian if kind == "hessian" else self.gauss_newton

    def forget(self) -> None:
        """Let go of kept graphs."""
        self._kept.clear()

    def _product(self, kind: Kind, vector: Tensor) -> Tensor:
        parts = [part.to(self.dtype) for part in self.view.split(vector.to(self.device)).values()]
        result = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        with math_attention():
            if kind not in self._kept:
                self._kept = {kind: []}  # of one kind at a time
            kept = self._kept[kind]
            for index, batch in enumerate(self.batches):
                graph = kept[index] if index < len(kept) else self._build(kind, batch)
                keep = index < len(kept) or (
                    index == len(kept)
                    and sum(g.bytes for g in kept) + graph.bytes <= self._kept_bytes
                )
                if keep and index == len(kept):
                    kept.append(graph)
                result += self._joined(graph.product(parts, keep=keep))
        if not bool(torch.isfinite(result).all()):
            raise ConfigError("a second derivative of the loss is not finite at these weights")
        self.products += 1
        self._worked(1.0)
        return result

    def _build(self, kind: Kind, batch: Tensor) -> _Graph:
        leaves = list(self._leaves.values())
        meter = _Meter()
        with meter:
            if kind == "hessian":
                loss = self._losses(self._leaves, batch, "sum") / self.tokens
                graph: _Graph = _HessianGraph(leaves, loss)
            else:
                graph = _GaussNewtonGraph(leaves, self._logits(self._leaves, batch), self.tokens)
        graph.bytes = meter.bytes
        return graph

    def _values(self, shift: Tensor | None) -> dict[str, Tensor]:
        values = {name: leaf.detach() for name, leaf in self._leaves.items()}
        if shift is None:
            return values
        # added in float64, so that a small shift is not lost before the one rounding
        return {
            name: (values[name].double() + part).to(self.dtype)
            for name, part in self.view.split(shift.to(self.device)).items()
        }

    def _logits(self, values: dict[str, Tensor], batch: Tensor) -> Tensor:
        inputs = batch[:, :-1]
        output = functional_call(self.model, {**self._fixed, **values}, (inputs,))
        return as_logits(output, inputs, type(self.model).__name__)

    def _losses(self, values: dict[str, Tensor], batch: Tensor, reduction: str) -> Tensor:
        logits = self._logits(values, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return self.view.join([part.detach().double() for part in parts])

    def _worked(self, share: float) -> None:
        if self.on_work is not None:
            self.on_work(share)


class _Graph(ABC):
    """What is kept of one micro-batch between products."""

    bytes = 0

    @abstractmethod
    def product(self, parts: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor]:
        """The matrix times a vector given in parts; `keep`: another product follows."""


class _HessianGraph(_Graph):
    def __init__(self, leaves: list[Tensor], loss: Tensor) -> None:
        self.leaves = leaves
        self.gradient = _gradients(loss, leaves, create_graph=True)

    def product(self, parts: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor]:
        # where the loss is linear in a tensor, its gradient depends on nothing
        pairs = [(g, v) for g, v in zip(self.gradient, parts, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        return torch.autograd.grad(
            [g for g, _ in pairs],
            self.leaves,
            [v for _, v in pairs],
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )


class _GaussNewtonGraph(_Graph):
    def __init__(self, leaves: list[Tensor], logits: Tensor, tokens: int) -> None:
        self.leaves, self.logits, self.tokens = leaves, logits, tokens
        self.probabilities = logits.detach().softmax(-1)
        self.cotangent = torch.zeros_like(logits, requires_grad=True)
        self.pulled = torch.autograd.grad(
            logits,
            leaves,
            self.cotangent,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def product(self, parts: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor]:
        pairs = [(g, v) for g, v in zip(self.pulled, parts, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        (pushed,) = torch.autograd.grad(
            [g for g, _ in pairs], [self.cotangent], [v for _, v in pairs], retain_graph=True
        )
        p = self.probabilities
        weighed = p * (pushed - (p * pushed).sum(-1, keepdim=True)) / self.tokens
        return torch.autograd.grad(
            self.logits,
            self.leaves,
            weighed,
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )


def _gradients(
    value: Tensor, leaves: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


class _Meter(saved_tensors_hooks):
    """Bytes that a graph built inside the context holds, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def dense(operator: Operator, size: int, device: torch.device | None = None) -> Tensor:
    """The (N, N) matrix of an operator, by unit vectors: for small N, and tests."""
    columns = []
    for index in range(size):
        unit = torch.zeros(size, dtype=torch.float64, device=device)
        unit[index] = 1.0
        columns.append(operator(unit))
    return torch.stack(columns, dim=1)
