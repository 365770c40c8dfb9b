"""The chunked loss is the plain loss: value, every derivative, memory, and time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from polyak import ops
from polyak.bench.timing import interleave, peak_bytes, threads
from polyak.errors import ConfigError
from polyak.ops import linear_cross_entropy, linear_cross_entropy_reference
from polyak.ops.linear_cross_entropy import Method, _chunks, tokens_per_chunk

TOKENS, VOCABULARY, WIDTH = 2048, 50_304, 384
"""The size that the memory and time of the loss are judged at."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
chunked: Loss = partial(linear_cross_entropy, method="chunked", chunk_tokens=4)
plain: Loss = partial(linear_cross_entropy, method="plain")


def inputs(
    tokens: int = 11, vocabulary: int = 7, width: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(tokens, width, dtype=dtype, requires_grad=True),
        torch.randn(vocabulary, width, dtype=dtype, requires_grad=True),
        torch.randint(vocabulary, (tokens,)),
    )


def on_meta(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary, width = shape
    return (
        torch.empty(tokens, width, device="meta", requires_grad=True),
        torch.empty(vocabulary, width, device="meta", requires_grad=True),
        torch.empty(tokens, dtype=torch.int64, device="meta"),
    )


def results(loss: Loss, x: Tensor, w: Tensor, t: Tensor, scale: float = 1.0) -> list[Tensor]:
    """The value, and the gradients of scale·loss."""
    x, w = (a.detach().clone().requires_grad_() for a in (x, w))
    value = loss(x, w, t)
    return [value.detach(), *torch.autograd.grad(scale * value, (x, w))]


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖a − b‖/‖b‖, in float64."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    return float((difference / expected.double().norm().clamp_min(1e-12)).detach())


def largest(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(map(relative, actual, expected))


def form(loss: Tensor) -> str:
    """Which form made a loss."""
    return "chunked" if "_LinearCrossEntropy" in type(loss.grad_fn).__name__ else "plain"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of everything allocated inside and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        own = {
            t.untyped_storage()._cdata
            for t in tree_iter((arguments, options))
            if isinstance(t, Tensor)
        }
        result = function(*arguments, **(options or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in own:
                storage = tensor.untyped_storage()
                self._held[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        self._held = {ref: size for ref, size in self._held.items() if not ref.expired()}
        return sum(self._held.values())


def peak_on_meta(loss: Loss, *shape: int) -> int:
    x, w, t = on_meta(*shape)
    with LiveBytes() as counted:
        (loss(x, w, t) / len(t)).backward()
    return counted.peak


# --- value and gradient


@pytest.mark.parametrize("method", ["plain", "chunked"])
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 13),
    vocabulary=st.integers(1, 12),
    width=st.integers(1, 6),
    chunk_tokens=st.integers(1, 15),
    scale=st.sampled_from([1.0, -2.5, 0.0]),
)
def test_value_and_gradients_are_those_of_the_reference(
    method: Method, tokens: int, vocabulary: int, width: int, chunk_tokens: int, scale: float
) -> None:
    arguments = inputs(tokens, vocabulary, width)
    loss = partial(linear_cross_entropy, method=method, chunk_tokens=chunk_tokens)
    found = results(loss, *arguments, scale=scale)
    expected = results(linear_cross_entropy_reference, *arguments, scale=scale)
    assert [a.dtype for a in found] == [torch.float64] * 3
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(0, 200), size=st.integers(1, 210))
def test_chunks_cover_all_tokens_in_order_and_are_as_equal_as_can_be(
    tokens: int, size: int
) -> None:
    chunks = list(_chunks(tokens, size))
    assert [i for c in chunks for i in range(tokens)[c]] == list(range(tokens))
    lengths = {c.stop - c.start for c in chunks}
    assert len(chunks) == -(-tokens // size)
    assert all(0 < n <= size for n in lengths)
    assert not lengths or max(lengths) - min(lengths) <= 1


def test_single_precision_is_within_a_millionth_of_float64() -> None:
    x, w, t = inputs(300, 4001, 64, torch.float32)
    w = 0.1 * w.detach()
    exact = results(linear_cross_entropy_reference, x.double(), w.double(), t)
    for loss in (plain, partial(chunked, chunk_tokens=77)):
        assert largest(results(loss, x, w, t), exact) < 1e-6


def test_chunked_gradients_round_less_than_plain_ones_at_initialisation() -> None:
    x, w, t = inputs(128, 30_000, 16, torch.float32)
    w = 0.02 * w.detach()
    exact = results(linear_cross_entropy_reference, x.double(), w.double(), t)[1:]
    by_plain = results(plain, x, w, t)[1:]
    by_chunks = results(chunked, x, w, t)[1:]
    for mine, other, right in zip(by_chunks, by_plain, exact, strict=True):
        assert relative(mine, right) < min(1e-7, relative(other, right))


@pytest.mark.parametrize("method", ["plain", "chunked"])
def test_huge_logits_neither_overflow_nor_hide(method: Method) -> None:
    x, w, t = inputs(dtype=torch.float32)
    found = results(partial(linear_cross_entropy, method=method), 1e4 * x, w, t)
    exact = results(linear_cross_entropy_reference, 1e4 * x.double(), w.double(), t)
    assert largest(found, exact) < 1e-3
    x.data[3, 1] = torch.nan
    assert linear_cross_entropy(x, w, t, method=method).isnan()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_input_alone_can_have_a_gradient(wanted: tuple[bool, bool]) -> None:
    x, w, t = inputs()
    expected = results(linear_cross_entropy_reference, x, w, t)[1:]
    leaves = [a.detach().requires_grad_(need) for a, need in zip((x, w), wanted, strict=True)]
    chunked(*leaves, t).backward()  # type: ignore[call-arg]
    for leaf, need, right in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == need
        assert leaf.grad is None or torch.allclose(leaf.grad, right, rtol=1e-11, atol=1e-12)


def test_a_weight_tied_to_the_embedding_gets_both_gradients() -> None:
    _, w, t = inputs(vocabulary=9)
    ids = torch.arange(11) % 9

    def gradient(loss: Loss) -> Tensor:
        return torch.autograd.grad(loss(F.embedding(ids, w).tanh(), w, t), w)[0]

    assert relative(gradient(chunked), gradient(linear_cross_entropy_reference)) < 1e-12


def test_a_weight_may_be_computed_and_strided() -> None:
    _, w, t = inputs()
    base = w.detach().T.contiguous().requires_grad_()  # (d, V)
    wide = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)

    def gradients(loss: Loss) -> list[Tensor]:
        return list(torch.autograd.grad(loss(wide[:, ::2], (2 * base).T, t), (wide, base)))

    assert largest(gradients(chunked), gradients(linear_cross_entropy_reference)) < 1e-12


def test_gradients_of_several_losses_accumulate() -> None:
    x, w, t = inputs()
    for _ in range(3):
        (chunked(x, w, t) / 3).backward()  # type: ignore[no-untyped-call]
    expected = results(linear_cross_entropy_reference, x, w, t)
    assert x.grad is not None
    assert w.grad is not None
    assert largest([x.grad, w.grad], expected[1:]) < 1e-12


# --- other derivatives


def test_numerical_derivatives_of_first_and_second_order_agree() -> None:
    x, w, t = inputs(tokens=5)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return chunked(x, w, t)

    assert form(loss(x, w)) == "chunked"
    assert gradcheck(loss, (x, w), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, (x, w), check_fwd_over_rev=True, check_batched_grad=True)


def test_a_retained_graph_can_be_used_again_and_a_freed_one_not() -> None:
    x, w, t = inputs()
    expected = results(linear_cross_entropy_reference, x, w, t)[1:]
    loss = chunked(x, w, t)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(-2 * loss, (x, w))
    assert all(map(torch.equal, first, kept))
    assert largest([-0.5 * g for g in second], expected) < 1e-12
    assert largest(kept, expected) < 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, w))


def test_a_weight_changed_before_the_backward_pass_is_an_error_as_everywhere_in_torch() -> None:
    x, w, t = inputs()
    loss = chunked(x, w, t)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_hessian_products_through_create_graph_are_those_of_the_reference() -> None:
    x, w, t = inputs()
    weights = torch.randn_like(x), torch.randn_like(w)

    def products(loss: Loss) -> list[Tensor]:
        hidden = (x @ torch.ones(3, 3, dtype=x.dtype)).tanh() * w.sum()  # features depend on w
        gradients = torch.autograd.grad(loss(hidden, w, t), (x, w), create_graph=True)
        along = sum((g * v).sum() for g, v in zip(gradients, weights, strict=True))
        assert isinstance(along, Tensor)
        return [*gradients, *torch.autograd.grad(along, (x, w))]

    assert largest(products(chunked), products(linear_cross_entropy_reference)) < 1e-10


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
@pytest.mark.parametrize("argument", [0, 1])
def test_function_transforms_are_those_of_the_reference(
    transform: Callable[..., Any], argument: int
) -> None:
    arguments = tuple(a.detach() for a in inputs())
    found = transform(chunked, argument)(*arguments)
    expected = transform(linear_cross_entropy_reference, argument)(*arguments)
    assert relative(found, expected) < 1e-11


def test_vmap_and_forward_mode_are_those_of_the_reference() -> None:
    x, w, t = (a.detach() for a in inputs(tokens=12))
    lanes = (x.unflatten(0, (3, 4)), t.unflatten(0, (3, 4)))
    found = vmap(grad(chunked, 1), (0, None, 0))(lanes[0], w, lanes[1])
    right = vmap(grad(linear_cross_entropy_reference, 1), (0, None, 0))(lanes[0], w, lanes[1])
    assert relative(found, right) < 1e-11
    tangents = torch.randn_like(x), torch.randn_like(w)
    _, found = jvp(lambda x, w: chunked(x, w, t), (x, w), tangents)
    _, right = jvp(lambda x, w: linear_cross_entropy_reference(x, w, t), (x, w), tangents)
    assert relative(found, right) < 1e-11


def test_batched_gradients_of_a_chunked_loss_are_the_loop() -> None:
    x, w, t = inputs()
    loss = chunked(x, w, t)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = torch.autograd.grad(loss, (x, w), scales, is_grads_batched=True, retain_graph=True)
    once = torch.autograd.grad(loss, (x, w))
    assert largest(list(found), [scales[:, None, None] * g for g in once]) < 1e-12


def test_a_module_called_functionally_still_trains() -> None:
    x, w, t = inputs()
    head = torch.nn.Linear(3, 7, bias=False).double()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return chunked(x, self.head.weight, t)

    value = functional_call(Model(), {"head.weight": w}, (x,))
    assert form(value) == "chunked"
    found = torch.autograd.grad(value, (x, w))
    assert largest(list(found), results(linear_cross_entropy_reference, x, w, t)[1:]) < 1e-12


# --- which form runs


def test_the_plain_form_serves_small_logits_and_the_chunked_form_large_ones() -> None:
    assert form(linear_cross_entropy(*on_meta(1024, 256, 128))) == "plain"
    assert form(linear_cross_entropy(*on_meta(TOKENS, VOCABULARY, WIDTH))) == "chunked"
    assert form(linear_cross_entropy(*on_meta(64, 50_304, 8))) == "plain"
    assert form(plain(*on_meta(TOKENS, VOCABULARY, WIDTH))) == "plain"
    assert form(chunked(*on_meta(8, 9, 3))) == "chunked"


def test_reference_forms_replace_every_method() -> None:
    x, w, t = inputs()
    expected = linear_cross_entropy_reference(x, w, t)
    with ops.reference_forms():
        assert form(chunked(x, w, t)) == "plain"
        assert torch.equal(chunked(x, w, t), expected)
        assert torch.equal(plain(x, w, t), expected)


@pytest.mark.parametrize("loss", [plain, chunked], ids=["plain", "chunked"])
def test_compiled_is_eager(loss: Loss) -> None:
    x, w, t = inputs()

    def model(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return 3 * loss(x.tanh(), w, t)

    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert largest(results(compiled, x, w, t), results(model, x, w, t)) < 1e-12
    with torch.no_grad():
        assert relative(compiled(x, w, t), model(x, w, t)) < 1e-12
    torch.compiler.reset()


def test_without_gradients_the_value_is_the_same_and_nothing_is_differentiated() -> None:
    x, w, t = inputs()
    expected = chunked(x, w, t)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, FlopCounterMode(display=False) as counted:
            found = chunked(x, w, t)
        assert torch.equal(found, expected)
        assert not found.requires_grad
        assert counted.get_total_flops() == 2 * x.numel() * w.shape[0]


# --- 16-bit floats


def test_autocast_rounds_the_products_only() -> None:
    x, w, t = inputs(200, 500, 32, torch.float32)
    exact = results(linear_cross_entropy_reference, x.double(), w.double(), t)
    with torch.autocast("cpu", torch.bfloat16):
        by_plain = results(plain, x, w, t)
        found = results(partial(chunked, chunk_tokens=9), x, w, t)
    assert [a.dtype for a in found] == [torch.float32] * 3
    assert relative(found[0], exact[0]) < 1e-3
    for mine, other, right in zip(found, by_plain, exact, strict=True):
        assert 0 < relative(mine, right) < max(1e-4, 1.5 * relative(other, right))


def test_autocast_leaves_float64_alone() -> None:
    arguments = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(chunked, *arguments)
    assert largest(found, results(linear_cross_entropy_reference, *arguments)) < 1e-12


def test_the_features_of_an_autocast_model_may_be_16_bit_and_the_weight_32() -> None:
    x, w, t = inputs(dtype=torch.float32)
    x = x.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(chunked, x, w, t)
        other = results(plain, x, w, t)
    assert [a.dtype for a in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert largest(found, other) < 0.02


def test_bfloat16_weight_gradients_are_summed_in_float32() -> None:
    x, w, t = inputs(4096, 16, 8, torch.bfloat16)
    exact = results(linear_cross_entropy_reference, x.double(), w.double(), t)
    found = results(chunked, x, w, t)
    assert [a.dtype for a in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    # a sum of 1024 chunks in bfloat16 would be off by several per cent
    assert relative(found[2], exact[2]) < 0.01
    assert relative(found[1], exact[1]) < 0.01


def test_a_double_backward_under_autocast_is_that_of_the_plain_form() -> None:
    x, w, t = inputs(20, 30, 8, torch.float32)

    def products(loss: Loss) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(x, w, t)
        gradients = torch.autograd.grad(value, (x, w), create_graph=True)
        along = gradients[0].square().sum() + gradients[1].square().sum()
        return list(torch.autograd.grad(along, (x, w)))

    assert largest(products(chunked), products(plain)) < 0.05


# --- memory and work


def test_at_the_real_vocabulary_memory_is_under_a_quarter_of_the_plain_form() -> None:
    size = (TOKENS, VOCABULARY, WIDTH)
    by_plain = peak_on_meta(plain, *size)
    assert by_plain > 3 * 4 * TOKENS * VOCABULARY  # the measure sees all three copies
    found = peak_on_meta(linear_cross_entropy, *size)
    assert found < by_plain / 8 < by_plain / 4
    # one (V, d) gradient, one chunk of logits, and little else
    assert found < 4 * VOCABULARY * WIDTH + 2**26 + 4 * 4 * TOKENS * WIDTH


def test_the_count_of_live_bytes_is_what_torch_allocates() -> None:
    size = (64, 3000, 16)
    for loss in (plain, partial(chunked, chunk_tokens=16)):
        x, w, t = inputs(*size, torch.float32)  # type: ignore[arg-type]

        def step(loss: Loss = loss, x: Tensor = x, w: Tensor = w, t: Tensor = t) -> None:
            (loss(x, w, t) / len(t)).backward()  # type: ignore[no-untyped-call]

        measured = peak_bytes(step)
        assert peak_on_meta(loss, *size) == pytest.approx(measured, rel=0.05)


def test_logits_in_memory_do_not_grow_with_the_tokens() -> None:
    size = tokens_per_chunk(VOCABULARY, torch.float32)
    few, many = (peak_on_meta(linear_cross_entropy, n * size, VOCABULARY, 8) for n in (5, 100))
    assert many - few < 95 * size * (4 * 4 * 8 + 64)  # a few vectors per token


def test_validation_holds_one_chunk_and_no_gradient() -> None:
    x, w, t = on_meta(TOKENS, VOCABULARY, WIDTH)
    with torch.no_grad(), LiveBytes() as counted:
        linear_cross_entropy(x, w, t)
    assert counted.peak < 2**26 + 2**16


def test_between_the_passes_only_the_gradients_are_kept() -> None:
    x, w, t = on_meta(TOKENS, VOCABULARY, WIDTH)
    with LiveBytes() as counted:
        loss = linear_cross_entropy(x, w, t)
        assert loss.requires_grad
        assert counted.live() <= 4 * (x.numel() + w.numel()) + 64
        w.requires_grad_(False)
        loss = linear_cross_entropy(x, w, t)
        assert loss.requires_grad
        assert counted.live() <= 4 * x.numel() + 64


def test_no_product_is_computed_twice() -> None:
    def products(loss: Loss) -> int:
        x, w, t = on_meta(TOKENS, VOCABULARY, WIDTH)
        with FlopCounterMode(display=False) as counted:
            loss(x, w, t).backward()  # type: ignore[no-untyped-call]
        return counted.get_total_flops()

    assert products(linear_cross_entropy) == products(plain) == 6 * TOKENS * VOCABULARY * WIDTH


@pytest.mark.slow
def test_at_the_real_vocabulary_it_is_exact_small_and_not_slow() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(TOKENS, WIDTH), 0.02 * torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    losses: dict[str, Loss] = {"plain": plain, "auto": linear_cross_entropy}
    steps = {k: partial(results, f, features, weight, targets) for k, f in losses.items()}
    exact = results(linear_cross_entropy, features.double(), weight.double(), targets)
    with threads(2):
        assert largest(steps["auto"](), exact) < 1e-6
        assert largest(steps["auto"](), steps["plain"]()) < 1e-6
        assert peak_bytes(steps["auto"]) < peak_bytes(steps["plain"]) / 4
        seconds = interleave(steps, 7)
    ratios = [a / b for a, b in zip(seconds["auto"], seconds["plain"], strict=True)]
    # 0.7 on an idle machine; the bound only has to tell a recomputation from noise
    assert statistics.median(ratios) < 1.3


# --- misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "chunk"}, "unknown method 'chunk'; did you mean 'chunked'"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be a whole number of at least 1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linear_cross_entropy(*inputs(), **options)


def test_half_precision_is_refused_by_the_chunked_form_only() -> None:
    x, w, t = inputs(dtype=torch.float16)
    with pytest.raises(ConfigError, match="float16; use bfloat16, or method='plain'"):
        chunked(x, w, t)
    assert linear_cross_entropy(x, w, t).dtype == torch.float32
    huge = [a.half() for a in on_meta(TOKENS, VOCABULARY, WIDTH)[:2]]
    targets = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    assert form(linear_cross_entropy(*huge, targets)) == "plain"  # type: ignore[call-arg]


@pytest.mark.parametrize("loss", [plain, chunked], ids=["plain", "chunked"])
@pytest.mark.parametrize("target", [-100, -1, 7])
def test_a_target_outside_the_vocabulary_is_an_error(loss: Loss, target: int) -> None:
    x, w, t = inputs()
    t[5] = target
    with pytest.raises((IndexError, RuntimeError), match=f"{target} is out of bounds"):
        loss(x, w, t)
