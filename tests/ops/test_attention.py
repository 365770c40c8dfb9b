"""Attention with a matrix state: chunks, quadratic form and recurrence are one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from polyak import ops
from polyak.bench.timing import peak_bytes
from polyak.errors import ConfigError, PolyakError, UnknownNameError
from polyak.ops import AttentionState
from polyak.ops.attention import sections
from polyak.ops.attention.weights import momentum_weights

KINDS = ["linear", "momentum", "adaptive_momentum"]

Function = Callable[..., Any]


def draw(
    kind: str,
    *,
    batch: int = 2,
    tokens: int = 11,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 3,
    out_width: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every tensor that attention of that kind depends on, learned mu and gamma included."""
    torch.manual_seed(seed)
    found = {
        "query": torch.randn(batch, tokens, heads, width, dtype=dtype),
        "key": torch.randn(batch, tokens, kv_heads, width, dtype=dtype),
        "value": torch.randn(batch, tokens, kv_heads, out_width, dtype=dtype),
    }
    if kind == "momentum":
        found["mu"] = torch.linspace(0.3, 0.9, kv_heads, dtype=dtype)
    if kind != "linear":
        found["gamma"] = torch.linspace(0.7, 1.5, kv_heads, dtype=dtype)
    return {name: t.requires_grad_() for name, t in found.items()}


def some_state(kind: str, inputs: dict[str, Tensor]) -> AttentionState:
    """A state as some earlier tokens left it."""
    earlier = draw(kind, batch=inputs["key"].shape[0], tokens=3, seed=1)
    tensors = {**earlier, **{n: inputs[n] for n in ("mu", "gamma") if n in inputs}}
    state: AttentionState = call(kind, "recurrent", tensors)[1]
    return leaves_of(state)


def leaves_of(state: AttentionState) -> AttentionState:
    found: Any = (t.detach().requires_grad_() if is_real(t) else t for t in state)
    return AttentionState(*found)


def is_real(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def call(kind: str, form: str, inputs: dict[str, Tensor], **options: Any) -> Any:
    """(outputs, state) by chunks, recurrence or the quadratic reference."""
    if form == "quadratic":
        with ops.reference_forms():
            return getattr(ops, f"{kind}_attention_with_state")(**inputs, **options)
    name = {"chunks": "with_state", "recurrent": "recurrent"}[form]
    return getattr(ops, f"{kind}_attention_{name}")(**inputs, **options)


def everything(
    kind: str, form: str, inputs: dict[str, Tensor], state: AttentionState | None, **options: Any
) -> list[Tensor]:
    """Outputs, state and all gradients of a loss that reads both."""
    out, after = call(kind, form, inputs, state=state, **options)
    results = [t for t in (out, *after) if t is not None and is_real(t)]
    torch.manual_seed(2)
    loss = sum((r * torch.randn(r.shape, dtype=torch.float64).to(r.dtype)).sum() for r in results)
    assert isinstance(loss, Tensor)
    leaves = [*inputs.values(), *(t for t in state or () if t is not None and is_real(t))]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(r.detach() for r in results), *found]


def furthest(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to each tensor's largest entry, or to 0.1 where that is less.

    A weighted normalizer cancels gamma: what is left of its gradient is a small difference of sums.
    """

    def relative(a: Tensor, e: Tensor) -> float:
        assert a.shape == e.shape
        if e.numel() == 0:
            return 0.0
        a, e = a.detach().double(), e.detach().double()
        return float((a - e).abs().max() / e.abs().max().clamp_min(0.1))

    return max(relative(a, e) for a, e in zip(actual, expected, strict=True))


def marks(batch: int, tokens: int) -> dict[str, Tensor]:
    """Padding on either side, holes, and several documents."""
    torch.manual_seed(3)
    mask = torch.rand(batch, tokens) > 0.3
    mask[0, :2] = mask[-1, -3:] = False
    return {"key_mask": mask, "document_starts": torch.rand(batch, tokens) > 0.8}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 13),
    chunk_size=st.integers(1, 8),
    kv_heads=st.sampled_from([1, 2, 4]),
    masked=st.booleans(),
    packed=st.booleans(),
    continued=st.booleans(),
    recompute=st.booleans(),
    normalizer=st.sampled_from(["plain", "weighted", "none"]),
)
def test_the_three_forms_agree_in_value_state_and_every_gradient(
    kind: str,
    tokens: int,
    chunk_size: int,
    kv_heads: int,
    masked: bool,
    packed: bool,
    continued: bool,
    recompute: bool,
    normalizer: str,
) -> None:
    assume(kind != "adaptive_momentum" or normalizer != "weighted")
    inputs = draw(kind, tokens=tokens, kv_heads=kv_heads)
    options: dict[str, Any] = {
        "normalize": normalizer != "none",
        "weighted_normalizer": normalizer == "weighted",
    }
    both = marks(2, tokens)
    options |= {n: t for n, t in both.items() if (masked if n == "key_mask" else packed)}
    state = None
    if continued:
        earlier = {n: t[:, :3] if t.dim() > 1 else t for n, t in inputs.items()}
        earlier = {n: t.detach().cos() if t.dim() > 1 else t for n, t in earlier.items()}
        state = call(
            kind, "recurrent", earlier, **{k: v for k, v in options.items() if k[-4:] == "izer"}
        )[1]
        state = leaves_of(state)
    expected = everything(kind, "recurrent", inputs, state, **options)
    quadratic = everything(kind, "quadratic", inputs, state, **options)
    assert furthest(quadratic, expected) < 1e-12
    chunks = everything(
        kind, "chunks", inputs, state, chunk_size=chunk_size, recompute=recompute, **options
    )
    assert furthest(chunks, expected) < 1e-12


@pytest.mark.parametrize("mu", [0.0, 0.1, 0.99, 0.999999, 1 - 1e-12])
def test_the_forms_agree_at_the_ends_of_mu(mu: float) -> None:
    inputs = draw("momentum", tokens=37)
    inputs["mu"] = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
    expected = everything("momentum", "recurrent", inputs, None)
    for form in ("chunks", "quadratic"):
        assert furthest(everything("momentum", form, inputs, None), expected) < 1e-12


def test_near_one_nothing_cancels_in_single_precision() -> None:
    inputs = draw("momentum", tokens=256, dtype=torch.float32)
    for mu in (0.0, 0.6, 0.99, 0.9999, 0.999999):
        inputs["mu"] = torch.tensor([mu, mu], dtype=torch.float64, requires_grad=True)
        inputs["gamma"] = inputs["gamma"].detach().double().requires_grad_()
        exact = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
        single = everything("momentum", "chunks", inputs, None)
        assert furthest(single, everything("momentum", "quadratic", exact, None)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_several_sections_and_a_short_last_chunk_agree_with_one_chunk(kind: str) -> None:
    inputs = draw(kind, batch=3, tokens=601, width=4, out_width=4)
    expected = everything(kind, "chunks", inputs, None, chunk_size=601)
    for recompute in (False, True):
        found = everything(kind, "chunks", inputs, None, chunk_size=100, recompute=recompute)
        assert furthest(found, expected) < 1e-12


def test_no_momentum_and_unit_step_is_linear_attention() -> None:
    inputs = draw("linear")
    expected = ops.linear_attention(**inputs)
    found = ops.momentum_attention(**inputs, mu=0, gamma=1)
    assert furthest([found], [expected]) < 1e-14
    scaled = ops.momentum_attention(**inputs, mu=0.0, gamma=2.5)
    assert furthest([scaled], [2.5 * expected]) < 1e-14


def test_the_gradient_is_momentum_attention_three_times() -> None:
    inputs = draw("momentum", kv_heads=4, tokens=23)
    mu, gamma = inputs["mu"].detach(), inputs["gamma"].detach()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.momentum_attention(
            q, k, v, mu=mu, gamma=gamma, feature_map="identity", normalize=False, chunk_size=4
        )

    q, k, v = (inputs[n] for n in ("query", "key", "value"))
    out = plain(q, k, v)
    dn = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dn)
    rq, rk, rv, rdn = (t.flip(1) for t in (q, k, v, dn))
    expected = plain(dn, v, k), plain(rv, rdn, rq).flip(1), plain(rk, rq, rdn).flip(1)
    assert furthest(list(found), list(expected)) < 1e-12
    gamma = gamma.requires_grad_()
    (by_gamma,) = torch.autograd.grad(plain(q, k, v), gamma, dn)
    assert furthest([by_gamma], [(out * dn).sum((0, 1, 3)) / gamma]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_pieces_and_tokens_one_by_one_are_the_whole(kind: str) -> None:
    inputs = draw(kind, tokens=20)
    whole, last = call(kind, "chunks", inputs)
    state, pieces = None, []
    for start, stop in ((0, 7), (7, 13)):
        part = {n: t[:, start:stop] if t.dim() == 4 else t for n, t in inputs.items()}
        out, state = call(kind, "chunks", part, state=state, chunk_size=4)
        pieces.append(out)
    step = getattr(ops, f"{kind}_attention_step")
    for t in range(13, 20):
        token = {n: x[:, t] if x.dim() == 4 else x for n, x in inputs.items()}
        out, state = step(**token, state=state)
        pieces.append(out[:, None])
    assert state is not None
    assert furthest([torch.cat(pieces, 1)], [whole]) < 1e-12
    assert furthest([t for t in state if t is not None], [t for t in last if t is not None]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_never_changed_and_rows_can_be_chosen(kind: str) -> None:
    inputs = {n: t.detach() for n, t in draw(kind, tokens=5).items()}
    state = some_state(kind, inputs)
    before = [None if t is None else t.clone() for t in state]
    token = {n: t[:, 0] if t.dim() == 4 else t for n, t in inputs.items()}
    step = getattr(ops, f"{kind}_attention_step")
    with torch.no_grad():
        first, after = step(**token, state=state)
        call(kind, "chunks", inputs, state=state)
        call(
            kind,
            "chunks",
            {n: t[:, :0] if t.dim() == 4 else t for n, t in inputs.items()},
            state=state,
        )
        again, _ = step(**token, state=state)
        assert torch.equal(first, again)
        assert all(a is None or torch.equal(a, b) for a, b in zip(state, before, strict=True))
        rows = torch.tensor([1, 1, 0])
        chosen = {n: t[rows] if t.dim() == 3 else t for n, t in token.items()}
        beams, _ = step(**chosen, state=after.rows(rows))
        straight, _ = step(**token, state=after)
        assert torch.equal(beams, straight[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_masked_tokens_are_as_if_they_were_not_there(kind: str, side: str) -> None:
    inputs = draw(kind, tokens=6)
    places = {"left": [3, 4, 5, 6, 7, 8], "right": [0, 1, 2, 3, 4, 5], "holes": [0, 2, 3, 6, 7, 8]}
    at = torch.tensor(places[side])
    mask = torch.zeros(2, 9, dtype=torch.int64)
    mask[:, at] = 1
    padded = {}
    for name, t in inputs.items():
        padded[name] = t
        if t.dim() == 4:
            padded[name] = torch.randn(2, 9, *t.shape[2:], dtype=t.dtype)
            padded[name][:, at] = t.detach()
    expected, state = call(kind, "chunks", inputs)
    out, padded_state = call(kind, "chunks", padded, key_mask=mask, chunk_size=4)
    assert furthest([out[:, at]], [expected]) < 1e-12
    for a, b in zip(padded_state, state, strict=True):
        assert a is b is None or furthest([a], [b]) < 1e-12
    if kind == "momentum":
        for form in ("two_sided", "read_after_write"):
            op: Any = ops.momentum_attention
            whole = op(**inputs, bidirectional=form)
            found = op(**padded, bidirectional=form, key_mask=mask, chunk_size=4)
            assert furthest([found[:, at]], [whole]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_each_its_own_sequence(kind: str) -> None:
    inputs = draw(kind, batch=1, tokens=14)
    starts = torch.zeros(1, 14, dtype=torch.bool)
    starts[:, [0, 5, 11]] = True
    state = some_state(kind, inputs)  # of an earlier document: not read
    out, last = call(kind, "chunks", inputs, state=state, document_starts=starts, chunk_size=4)
    for a, b in ((0, 5), (5, 11), (11, 14)):
        alone = {n: t[:, a:b] if t.dim() == 4 else t for n, t in inputs.items()}
        expected, alone_state = call(kind, "chunks", alone)
        assert furthest([out[:, a:b]], [expected]) < 1e-12
    for x, y in zip(last, alone_state, strict=True):
        assert x is y is None or furthest([x], [y]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_nothing_earlier(kind: str) -> None:
    inputs = {n: t.detach() for n, t in draw(kind, tokens=12).items()}
    before = call(kind, "chunks", inputs, chunk_size=4)[0]
    for name in ("query", "key", "value"):
        changed = dict(inputs)
        changed[name] = inputs[name].clone()
        changed[name][:, 7:] += 1
        after = call(kind, "chunks", changed, chunk_size=4)[0]
        assert torch.equal(before[:, :7], after[:, :7])
        assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ops.FEATURE_MAPS))
def test_every_feature_map_has_the_gradient_of_its_formula(kind: str, name: str) -> None:
    formulas: dict[str, Function] = {
        "elu1": lambda x: F.elu(x) + 1,
        "relu": F.relu,
        "identity": lambda x: x,
        "softplus": F.softplus,
    }
    inputs = draw(kind)
    mapped = dict(inputs)
    for n in ("query", "key"):
        mapped[n] = formulas[name](inputs[n])
    options: dict[str, Any] = {"normalize": name not in ("identity", "relu")}
    found = call(kind, "chunks", inputs, feature_map=name, chunk_size=4, **options)[0]
    expected = call(kind, "quadratic", mapped, feature_map="identity", **options)[0]
    cotangent = torch.randn_like(found)
    leaves = list(inputs.values())
    pair = [torch.autograd.grad(o, leaves, cotangent) for o in (found, expected)]
    assert furthest([found, *pair[0]], [expected, *pair[1]]) < 1e-12


def test_a_feature_far_below_zero_keeps_its_digits() -> None:
    x = torch.tensor([-60.0, -1e-9, 0.0, 3.0])
    y = ops.FEATURE_MAPS["elu1"].apply(x)
    assert torch.allclose(
        y,
        torch.tensor([-60.0, -1e-9, 0.0, 3.0]).double().clamp(max=0).exp().float() + x.relu(),
        rtol=1e-6,
        atol=0,
    )
    assert float(y[0]) > 0


def brute_force(inputs: dict[str, Tensor], weights: Tensor) -> Tensor:
    """Normalized attention of given weights (Hₖ, T, T) of momentum, all keys in the normalizer."""
    group = inputs["query"].shape[2] // inputs["key"].shape[2]
    q = F.elu(inputs["query"]) + 1
    k = (F.elu(inputs["key"]) + 1).repeat_interleave(group, 2)
    v = inputs["value"].repeat_interleave(group, 2)
    pairs = torch.einsum("bihd,bjhd->bhij", q, k)
    above = torch.einsum("bhij,bjhm->bihm", pairs * weights.repeat_interleave(group, 0), v)
    return above / (pairs.sum(-1).transpose(1, 2)[..., None] + 1e-6)


def test_two_sided_momentum_is_its_weights_and_turns_with_time() -> None:
    inputs = draw("momentum", tokens=13)
    mu, gamma = inputs["mu"], inputs["gamma"]
    distance = (torch.arange(13)[:, None] - torch.arange(13)).abs() + 1
    weights = torch.stack([g * (1 - m**distance) / (1 - m) for m, g in zip(mu, gamma, strict=True)])
    out = ops.momentum_attention(**inputs, bidirectional="two_sided", chunk_size=4)
    expected = brute_force(inputs, weights)
    cotangent, leaves = torch.randn_like(out), list(inputs.values())
    pair = [torch.autograd.grad(o, leaves, cotangent) for o in (out, expected)]
    assert furthest([out, *pair[0]], [expected, *pair[1]]) < 1e-12
    turned = {n: t.flip(1) if t.dim() == 4 else t for n, t in inputs.items()}
    back = ops.momentum_attention(**turned, bidirectional="two_sided", chunk_size=5).flip(1)
    assert furthest([back], [out]) < 1e-12
    still = ops.momentum_attention(
        *(inputs[n] for n in ("query", "key", "value")), mu=0, gamma=3, bidirectional="two_sided"
    )
    linear = ops.linear_attention(
        *(inputs[n] for n in ("query", "key", "value")), bidirectional="two_sided"
    )
    assert furthest([still], [3 * linear]) < 1e-12


def test_reading_after_writing_is_the_last_state_of_the_recurrence() -> None:
    inputs = draw("momentum", tokens=9, kv_heads=4)
    _, state = call("momentum", "recurrent", inputs)
    query = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    out = ops.momentum_attention(**{**inputs, "query": query}, bidirectional="read_after_write")
    q = F.elu(query) + 1
    above = torch.einsum("bihd,bhdm->bihm", q, state.S)
    below = torch.einsum("bihd,bhd->bih", q, state.Z)[..., None] + 1e-6
    assert furthest([out], [above / below]) < 1e-12


def test_scales_and_the_weighted_normalizer_do_what_they_say() -> None:
    inputs = draw("momentum", tokens=9)
    op: Any = ops.momentum_attention
    plain = op(**inputs, normalize=False)
    assert furthest([op(**inputs, normalize=False, scale="head_dim")], [plain / 3**0.5]) < 1e-12
    both = op(**inputs, normalize=False, bidirectional="two_sided")
    found = op(**inputs, normalize=False, bidirectional="two_sided", scale="sqrt_length")
    assert furthest([found], [both / 3]) < 1e-12
    for form in (None, "two_sided", "read_after_write"):
        constant = {**inputs, "value": torch.ones_like(inputs["value"])}
        averages = op(**constant, weighted_normalizer=True, eps=0.0, bidirectional=form)
        assert furthest([averages], [torch.ones_like(averages)]) < 1e-12


def small(kind: str) -> tuple[Function, list[Tensor]]:
    inputs = draw(kind, batch=1, tokens=3, heads=2, kv_heads=1, width=2, out_width=1)
    names = list(inputs)
    op: Any = getattr(ops, f"{kind}_attention")

    def function(*tensors: Tensor) -> Tensor:
        result: Tensor = op(**dict(zip(names, tensors, strict=True)), chunk_size=2)
        return result

    return function, list(inputs.values())


@pytest.mark.parametrize("kind", KINDS)
def test_numerical_derivatives_of_first_and_second_order_agree(kind: str) -> None:
    function, inputs = small(kind)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_agree_with_those_of_the_reference(kind: str) -> None:
    function, inputs = small(kind)
    arguments = tuple(t.detach() for t in inputs)

    def reference(*tensors: Tensor) -> Tensor:
        with ops.reference_forms():
            result: Tensor = function(*tensors)
        return result

    tangents = tuple(torch.randn_like(t) for t in arguments)
    pushed = [jvp(f, arguments, tangents)[1] for f in (function, reference)]
    assert furthest(pushed[:1], pushed[1:]) < 1e-12
    for transform in (jacrev, jacfwd):
        every = tuple(range(len(arguments)))
        found = transform(function, every)(*arguments)
        expected = transform(reference, every)(*arguments)
        assert furthest(list(found), list(expected)) < 1e-11
    many = tuple(torch.stack([t, 0.9 * t]) for t in arguments)
    loop = torch.stack([function(*(t[i] for t in many)) for i in range(2)])
    assert furthest([vmap(function)(*many)], [loop]) < 1e-12
    slopes = vmap(grad(lambda *a: (function(*a) ** 2).sum()))(*many)
    each = [grad(lambda *a: (reference(*a) ** 2).sum())(*(t[i] for t in many)) for i in range(2)]
    assert furthest([slopes], [torch.stack(each)]) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_single_precision_under_autocast_and_for_16_bits(kind: str) -> None:
    inputs = draw(kind, tokens=70, dtype=torch.float32)
    expected = everything(kind, "chunks", inputs, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(kind, "chunks", inputs, None)
    assert all(map(torch.equal, found, expected))
    half = {n: t.detach().bfloat16() if t.dim() == 4 else t for n, t in inputs.items()}
    out, state = call(kind, "chunks", half)
    assert out.dtype == torch.bfloat16
    assert all(t is None or t.dtype == torch.float32 for t in state if is_real(t))
    exact = {n: t.float() for n, t in half.items()}
    assert torch.equal(out, call(kind, "chunks", exact)[0].bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors_give_shapes_without_data(kind: str) -> None:
    inputs = {n: t.detach().to("meta").requires_grad_() for n, t in draw(kind, tokens=9).items()}
    out, state = call(kind, "chunks", inputs, chunk_size=4)
    assert out.shape == (2, 9, 4, 5)
    assert state.S.shape == (2, 2, 3, 5)
    out.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_can_be_asked_for_twice_and_in_part(kind: str, batch: int) -> None:
    inputs = draw(kind, batch=batch, tokens=9, heads=2 * batch, kv_heads=2)
    out = call(kind, "chunks", inputs, chunk_size=4)[0]
    cotangent, leaves = torch.randn_like(out), list(inputs.values())
    before = [t.detach().clone() for t in (*leaves, cotangent)]
    first = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    assert all(map(torch.equal, (*leaves, cotangent), before))
    second = torch.autograd.grad(out, leaves, cotangent)
    assert all(map(torch.equal, first, second))
    for name, expected in zip(inputs, first, strict=True):
        alone = {n: t if n == name else t.detach() for n, t in inputs.items()}
        (found,) = torch.autograd.grad(
            call(kind, "chunks", alone, chunk_size=4)[0], inputs[name], cotangent
        )
        assert torch.equal(found, expected)


def test_weights_of_whole_chunks_are_shared_and_small() -> None:
    mu = torch.tensor([0.5, 0.9], dtype=torch.float64)
    weights = momentum_weights(mu, mu, None, 4, torch.zeros(()))
    assert weights.mix.shape == (1, 1, 2, 4, 4)
    assert torch.allclose(weights.mix[0, 0, 0, 3], 0.5 * torch.tensor([1.875, 1.75, 1.5, 1.0]))


def test_memory_grows_by_what_the_gradient_has_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "_SECTION", 1 << 13)

    def peak(tokens: int, **options: Any) -> int:
        q, k, v = (torch.randn(2, tokens, 2, 16, requires_grad=True) for _ in range(3))

        def step() -> None:
            out = ops.momentum_attention(q, k, v, mu=0.6, gamma=1.0, chunk_size=16, **options)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        return peak_bytes(step)

    one = 1024 * 2 * 2 * 16 * 4  # bytes that one input grows by
    # out, its gradient and the inputs' three; S and P of every chunk take as much as two inputs
    assert peak(2048) - peak(1024) < 7.5 * one
    assert peak(2048, recompute=True) - peak(1024, recompute=True) < 6.5 * one


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mu": 1.0}, "mu=1 must be at least 0 and below 1"),
        ({"mu": -0.1}, "mu=-0.1 must be at least 0"),
        ({"mu": float("nan")}, "mu=nan"),
        ({"mu": torch.tensor([0.5, 1.5])}, "mu=1.5"),
        ({"mu": torch.tensor([0.5, 0.5, 0.5])}, r"mu of shape \(3,\) must be a number or \(2,\)"),
        ({"gamma": 0.0}, "gamma=0 must be positive"),
        ({"feature_map": "elu_1"}, "unknown feature_map 'elu_1'; did you mean 'elu1'"),
        ({"scale": "head_dims"}, "did you mean 'head_dim'"),
        ({"scale": "sqrt_length"}, "scale='sqrt_length' needs bidirectional"),
        ({"chunk_sice": 4}, "unknown option 'chunk_sice'; did you mean 'chunk_size'"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"eps": -1.0}, "eps=-1.0 must not be negative"),
        ({"normalize": False, "weighted_normalizer": True}, "needs normalize=True"),
        ({"bidirectional": "two-sided"}, "did you mean 'two_sided'"),
        ({"form": "release"}, "unknown form 'release'; did you mean 'released'"),
        ({"form": "released", "bidirectional": "lra"}, "form='released' is causal"),
        ({"form": "released", "weighted_normalizer": True}, "use form='exact'"),
        ({"bidirectional": "lra", "scale": "head_dim"}, "bidirectional='lra' has its own scale"),
        ({"bidirectional": "two_sided", "document_starts": torch.zeros(2, 11)}, "causal"),
        ({"key_mask": torch.ones(11, 11)}, "linear attention can leave out tokens"),
        ({"key_mask": torch.full((2, 11), 0.5)}, "only 0 and 1"),
        ({"query": torch.zeros(2, 11, 3, 3)}, "not a multiple of the 2"),
        ({"query": torch.zeros(2, 11, 3)}, r"must be \(batch, time, heads, width\)"),
        ({"query": torch.zeros(2, 10, 4, 3)}, "query has 10 positions and key 11"),
        ({"value": torch.zeros(2, 11, 4, 3)}, "agree in batch, time and heads"),
        ({"query": torch.zeros(2, 11, 4, 5)}, "agree in batch and width"),
    ],
)
def test_a_mistake_is_one_clear_line(options: dict[str, Any], words: str) -> None:
    inputs: dict[str, Any] = {**draw("momentum"), "mu": 0.5, "gamma": 1.0, **options}
    with pytest.raises(ConfigError, match=words) as caught:
        ops.momentum_attention(**inputs)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_kind_or_size_is_refused() -> None:
    inputs = draw("momentum")
    linear = ops.linear_attention_with_state(*(inputs[n] for n in ("query", "key", "value")))[1]
    with pytest.raises(PolyakError, match=r"state\.P is missing: these inputs need \(2, 2, 3, 5\)"):
        ops.momentum_attention_with_state(**inputs, state=linear)
    state = some_state("momentum", inputs).rows(torch.tensor([0]))
    with pytest.raises(PolyakError, match=r"state\.S is of shape"):
        ops.momentum_attention_with_state(**inputs, state=state)
    with pytest.raises(UnknownNameError, match="unknown option"):
        ops.linear_attention_step(*(inputs[n][:, 0] for n in ("query", "key", "value")), mu=0.5)  # type: ignore[call-arg]
