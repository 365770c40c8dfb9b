r"""What one call of a rule's `step` costs per token: declared by the rule, or measured.

Two columns. **Matrix products** are counted as `torch.utils.flop_counter.FlopCounterMode` counts
them (2mnk for m×k by k×n), forward and backward, in the fast forms that really run.
**Elementwise work** is the number of elements that arithmetic outside matrix products writes,
forward only, in the plain reference forms, so that it describes the equation and not how it is
fused: see `ElementCounter` for the exact definition.

Built-in rules declare both in a line, `work = Work(passes=...)`; the tests compare with the
counters. A rule that declares nothing is measured by running its `step` once, with a stand-in for
the oracle. Declarations are not inherited: a subclass that changes `step` is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from polyak import ops
from polyak.errors import RuleError
from polyak.ops.gram import gram_ema_flops
from polyak.ops.inverse_sqrt import inverse_sqrt_apply_flops
from polyak.ops.newton_schulz import newton_schulz_flops
from polyak.rules._work import StepCost

if TYPE_CHECKING:
    from polyak.rules._base import UpdateRule

# torch 2.13 counts a batched product that adds in place as nothing
flop_registry.setdefault(torch.ops.aten.baddbmm_, flop_registry[torch.ops.aten.baddbmm])


def step_cost(
    rule: type[UpdateRule],
    d_model: int,
    num_heads: int,
    *,
    norm_eps: float = 1e-5,
    bias: bool = False,
    norm_kind: str = "layer",
    options: Mapping[str, Any] | None = None,
) -> StepCost:
    """One token's cost of one `step` of `rule`: as declared, or measured where nothing is.

    Raises:
        RuleError: the rule declares nothing and its step fails when it is run for measuring.
    """
    if rule.work is None:
        return measure(
            rule,
            d_model,
            num_heads,
            norm_eps=norm_eps,
            bias=bias,
            norm_kind=norm_kind,
            options=options or {},
        )
    resolved = rule.resolve(options or {})
    norms = sum(resolved[norm.option] == "layer" for norm in rule.norms.values())
    with_norm = sum(s.requires is not None for s in rule.present_scalars(resolved).values())
    norm = norm_elements(norm_kind, d_model, bias)
    elements = (rule.work.passes + with_norm) * d_model + norms * norm
    if rule.work.matrices is None:
        return StepCost(elements)
    matrices = rule.work.matrices(num_heads, d_model // num_heads)
    return StepCost(elements + matrices.elements, matrices.forward_flops, matrices.backward_flops)


def norm_elements(kind: str, width: int, bias: bool = False) -> int:
    """Elements written by the norm of one vector.

    LayerNorm: u−ū, its square, the quotient, ·w (and +b), 4 numbers; RMSNorm: u², the quotient,
    ·w, 3 numbers.
    """
    return 3 * width + 3 if kind == "rms" else (5 if bias else 4) * width + 4


def newton_schulz_cost(heads: int, head_dim: int) -> StepCost:
    """`ops.newton_schulz` of one token's (H, D) matrix."""
    d, gram, steps = heads * head_dim, head_dim * head_dim, 5
    # normalising: 2d + 3; an iteration: aY, bA, cA², their sum, Y + …
    elements = 2 * d + 3 + steps * (2 * d + 3 * gram)
    return StepCost(elements, *newton_schulz_flops(heads, head_dim, steps))


def shampoo_cost(heads: int, head_dim: int) -> StepCost:
    """`ops.gram_ema`, then `ops.inverse_sqrt_apply`, of one token's (H, D) and (D, D) matrices."""
    d, gram, steps = heads * head_dim, head_dim * head_dim, 10
    # the average: 3 D²; R', its square and R'/n: 3 D² + 3; an iteration: 3I − …, ½X; result: d
    elements = 3 * gram + 3 * gram + 3 + steps * 2 * gram + d
    average = gram_ema_flops(heads, head_dim)
    root = inverse_sqrt_apply_flops(heads, head_dim, steps)
    return StepCost(elements, average[0] + root[0], average[1] + root[1])


def measure(
    rule: type[UpdateRule],
    d_model: int,
    num_heads: int,
    *,
    norm_eps: float = 1e-5,
    bias: bool = False,
    norm_kind: str = "layer",
    options: Mapping[str, Any],
) -> StepCost:
    """One token's cost of one `step`, found by running it on two batch sizes and subtracting.

    Rules mix no tokens, so cost is a constant (maps of the scalars) plus a part linear in tokens;
    the difference is the linear part. Runs on the meta device, or on the CPU for a rule that
    reads values while it runs.

    Raises:
        RuleError: `step` fails.
    """
    error: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                instance = rule(
                    d_model,
                    num_heads,
                    norm_eps=norm_eps,
                    bias=bias,
                    norm_kind=norm_kind,
                    options=options,
                )
                one, two = (_run(instance, d_model, batch) for batch in (1, 2))
        except Exception as failure:  # a user's step may raise anything
            error = error or failure
            continue
        return StepCost(
            elements=(two.elements - one.elements) // _TOKENS,
            forward_flops=(two.forward_flops - one.forward_flops) // _TOKENS,
            backward_flops=(two.backward_flops - one.backward_flops) // _TOKENS,
            oracle_calls=one.oracle_calls,
        )
    raise RuleError(
        f"rule {rule.name}: its step fails when run to measure its cost: "
        f"{type(error).__name__}: {error}"
    ) from error


_TOKENS = 2


def _run(rule: UpdateRule, d_model: int, batch: int) -> StepCost:
    calls = 0

    def oracle(_: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.randn(batch, _TOKENS, d_model, requires_grad=True)

    def step() -> list[Tensor]:
        x = torch.randn(batch, _TOKENS, d_model, requires_grad=True)
        starts = {
            stream.name: torch.randn_like(x)
            if stream.start in ("embedding", "x")
            else stream.constant(x, rule.num_heads).clone()
            for stream in rule.streams
        }
        state = rule.State(**{name: start.requires_grad_() for name, start in starts.items()})
        outputs = tree_leaves(rule.step(x, state, oracle))
        return [y for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]

    with FlopCounterMode(display=False) as forward:
        outputs = step()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    oracle_calls = calls
    with count_elements() as elementwise, ops.reference_forms(), torch.no_grad():
        step()
    return StepCost(
        elementwise.elements, forward.get_total_flops(), backward.get_total_flops(), oracle_calls
    )


class ElementCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as below
    """Counts elementwise work: the elements that arithmetic outside matrix products writes.

    - Every tensor operation counts its output's elements, reductions too (a mean over d counts 1).
    - LayerNorm counts as written out, fused or not (`norm_elements`).
    - Not counted: matrix products; the attention kernel with its mask and softmax, which belongs
      to the matrix column; views, copies, table look-ups, constants and random numbers, which
      calculate nothing.
    """

    elements = 0
    in_attention = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        outputs = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is torch.ops.aten.native_layer_norm:
            u, _, weight, bias = args[:4]
            rows = u.numel() // u.shape[-1]
            self.elements += u.numel() * (3 + (weight is not None) + (bias is not None)) + 4 * rows
        elif not (
            self.in_attention
            or func.is_view
            or packet in flop_registry
            or packet.__name__.rstrip("_") in _MOVES
        ):
            self.elements += sum(_numels(outputs))
        return outputs


@contextmanager
def count_elements() -> Iterator[ElementCounter]:
    """`with count_elements() as counter:` counts into `counter.elements`."""
    counter = ElementCounter()  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    with _AttentionWatch(counter), counter:
        yield counter


class _AttentionWatch(TorchFunctionMode):
    def __init__(self, counter: ElementCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = func is F.scaled_dot_product_attention
        self.counter.in_attention |= inside
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.in_attention &= not inside


def _numels(outputs: Any) -> Iterable[int]:
    return (leaf.numel() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


_MOVES = frozenset(
    name
    for line in (
        "_reshape_alias _to_copy _unsafe_view alias cat clone constant_pad_nd copy detach",
        "embedding expand_copy gather index index_select lift_fresh repeat select_scatter",
        "slice_scatter split split_with_sizes stack tril triu",
        "arange empty empty_like empty_strided eye fill full full_like new_empty new_full",
        "new_ones new_zeros ones ones_like resize scalar_tensor zero zeros zeros_like",
        "bernoulli normal rand rand_like randint randn randn_like uniform",
    )
    for name in line.split()
)
"""Operations that calculate nothing, by name without the in-place underscore."""
