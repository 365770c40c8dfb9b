"""Memory that training needs, from a step carried out on tensors without data.

The model, the loss and the optimizers run as they do in training, on fake tensors: torch works
out every shape, dtype and saved tensor, and nothing is computed or allocated. Counting which of
their storages are alive at each moment gives the peak as torch's allocator would see it.
Left out: the interpreter and torch themselves, kernels' own work space, the allocator's rounding
and fragmentation, and what `torch.compile` changes.
"""

from __future__ import annotations

import importlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyak.errors import RuleError
from polyak.nn.transformer import Transformer
from polyak.ops import inverse_sqrt
from polyak.training.config.run import RunConfig
from polyak.training.loss import LossModule
from polyak.training.optimizers import Optimizers

# `polyak.ops` has a function of that name
_walk: Any = importlib.import_module("polyak.ops.attention.walk")
_adaptive: Any = importlib.import_module("polyak.ops.attention.adaptive")
_options: Any = importlib.import_module("polyak.ops.attention.options")
_vocabulary: Any = importlib.import_module("polyak.ops.linear_cross_entropy")

VALIDATION_SEQUENCES = 32
"""Sequences in a batch of the validation set, see `trainer.validation_set`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that one process holds: parts first, then the peaks of a step's phases."""

    weights: int
    """The parameters, tied ones once."""
    gradients: int
    """Their gradients."""
    optimizer: int
    """Momentum and moments of the optimizers."""
    perturbation: int
    """SAM's copy of the weights; 0 without SAM."""
    buckets: int
    """DDP's copy of the gradients; 0 with one process."""
    activations: int
    """What one micro-batch saves for its gradient, up to the final norm."""
    temporary: int
    """What is held beside all that at the peak of the two passes: logits and their gradients, or
    temporaries of the backward pass."""
    forward_backward: int
    """Peak over the forward and backward passes."""
    update: int
    """Peak while the weights are updated."""
    validation: int
    """Peak while the validation loss is computed."""

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(self.forward_backward, self.update, self.validation)


def memory(
    config: RunConfig, *, processes: int = 1, cuda: bool = False, buckets: bool = False
) -> Memory:
    """What training `config` holds in one of its processes, which has the whole model.

    Args:
        config: the run; its rule's step is carried out on tensors without data.
        processes: that share the global batch.
        cuda: on CUDA, where `precision="auto"` is bfloat16. Autocast is counted by the CPU's list
            of operations, which is close to CUDA's.
        buckets: gradients are exchanged by DDP, through a copy of their own.

    Raises:
        RuleError: a user's rule asks for values, which tensors without data do not have.
        PolyakError: the model or its optimizers cannot be built.
    """
    try:
        return _memory(config, processes, cuda, buckets)
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ) as error:
        raise RuleError(
            f"rule {config.model.rule}: its step needs the values of tensors ({error}), so its "
            "memory cannot be estimated without training"
        ) from error


def _memory(config: RunConfig, processes: int, cuda: bool, buckets: bool) -> Memory:
    recipe, length = config.training, config.model.context_length
    bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and cuda)
    share = recipe.batch_size // processes
    rows = recipe.micro_batch_size or share
    with torch.device("meta"):  # not in the fake mode: building a model reads a drawn seed
        model = Transformer(config.model)
    live = _Live()
    with _as_with_data(cuda), FakeTensorMode(allow_non_fake_inputs=True), live:
        model.to_empty(device="cpu")
        if config.model.tie_embeddings:  # every module has got storage of its own
            model.head.weight = model.embedding.tokens.weight
        weights = live.held
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers = Optimizers(model, recipe)
        gradients, state, update = _optimizer_memory(live, parameters, optimizers)
        loss, resting, marks = LossModule(model, recipe.vocabulary_loss), live.held, list[int]()
        model.norm.register_forward_hook(lambda *_: marks.append(live.held))
        # from the second micro-batch on, the gradients of those before are there
        passes = 1 if rows == share else 2
        ids = torch.empty(rows, length + 1, dtype=torch.int64)
        sequences = -(-min(VALIDATION_SEQUENCES, recipe.eval_tokens // length) // processes)

        def accumulate() -> None:
            for _ in range(passes):
                with _autocast(bfloat16):
                    loss(ids).backward()

        def validate() -> None:
            with torch.no_grad(), _autocast(bfloat16):
                loss(torch.empty(sequences, length + 1, dtype=torch.int64))

        peak, saved = live.peak_of(accumulate), marks[-1]
        for parameter in parameters:
            parameter.grad = None
        model.eval()
        validation = live.peak_of(validate)
    copy = weights if recipe.sam != "off" else 0
    exchanged = gradients if buckets else 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        perturbation=copy,
        buckets=exchanged,
        activations=saved - resting - (gradients if passes == 2 else 0),
        temporary=peak - saved,
        forward_backward=peak + copy + exchanged,
        update=update + exchanged,
        validation=validation + exchanged,
    )


def _optimizer_memory(
    live: _Live, parameters: Sequence[Tensor], optimizers: Optimizers
) -> tuple[int, int, int]:
    """Bytes of the gradients, of the optimizers' state, and the peak of an update."""
    gradients = state = update = 0
    for _ in range(2):  # the first update makes the state
        before = live.held
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        gradients = live.held - before
        update = live.peak_of(lambda: optimizers.step(1.0))
        state += live.held - before
    return gradients, state, update


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts the bytes of all storages that are alive, among those made while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor here
        self.held = 0
        self._peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def peak_of(self, step: Callable[[], object]) -> int:
        """The most bytes that are held at once during `step`."""
        self._peak = self.held
        step()
        return self._peak

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.held -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.held += size
        self._peak = max(self._peak, self.held)


def _autocast(bfloat16: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else nullcontext()


@contextmanager
def _as_with_data(cuda: bool) -> Iterator[None]:
    """Take fake tensors through the forms that tensors with data take, for this module's use.

    Attention with a state and the loss over the vocabulary have plain forms for tensor subclasses,
    which fake tensors are to Python, and attention looks at its coefficients' values. The loss and
    the inverse square root go through up to thousands of slices, all alike, which would take
    minutes. Here they make their work space and results, and few slices or none.
    """

    def slices(m: Tensor, r: Tensor, steps: int, matrices: int) -> list[Tensor]:
        limit = inverse_sqrt._CHUNK_BYTES_OTHER // (r.shape[-1] ** 2 * r.element_size())
        part = slice(max(1, limit) if cuda else inverse_sqrt._chunk_tokens(r))
        work = [torch.empty_like(r[part]) for _ in range(matrices)]
        return work + [torch.empty_like(m[part]) for _ in range(steps)]

    def value(m: Tensor, r: Tensor, steps: int) -> Tensor:
        work = slices(m, r, steps, 4)
        result = torch.empty_like(m)
        del work
        return result

    def vjp(m: Tensor, r: Tensor, grad: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        work = slices(m, r, steps, steps + 4)
        result = torch.empty_like(m), torch.empty_like(r)
        del work
        return result

    def ordinary(*tensors: Tensor) -> bool:
        return True

    def first_chunks(tokens: int, largest: int) -> Iterator[slice]:
        yield from itertools.islice(all_chunks(tokens, largest), 2)

    def at_hand(tensor: Tensor) -> bool:
        return False

    attention = _walk.ordinary, _adaptive.ordinary, _options._values_at_hand
    _walk.ordinary, _adaptive.ordinary, _options._values_at_hand = ordinary, ordinary, at_hand
    kept = inverse_sqrt._value, inverse_sqrt._vjp
    all_chunks, kept_ordinary = _vocabulary._chunks, _vocabulary._ordinary
    inverse_sqrt._value, inverse_sqrt._vjp = value, vjp
    _vocabulary._chunks, _vocabulary._ordinary = first_chunks, ordinary
    try:
        yield
    finally:
        _walk.ordinary, _adaptive.ordinary, _options._values_at_hand = attention
        inverse_sqrt._value, inverse_sqrt._vjp = kept
        _vocabulary._chunks, _vocabulary._ordinary = all_chunks, kept_ordinary
