"""Curvature products against dense float64 matrices of small models of every rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from polyak import Transformer, ops, rules
from polyak.analysis._common import math_attention
from polyak.analysis.groups import GROUPS, parameter_groups
from polyak.analysis.hessian import Surface, dense
from polyak.analysis.lanczos import extremes
from polyak.errors import ConfigError, DataError
from polyak.nn import attention

MATRICES = ("muon", "ortho", "shampoo", "soap")  # the rules of which a Hessian takes longest
CONTROLS: dict[str, Any] = {
    "embedding_norm": "layer",
    "stream_start": "x",
    "residual_width": 8,
    "embedding_reinjection": True,
}
every_rule = pytest.mark.parametrize(
    "rule",
    [pytest.param(r, marks=pytest.mark.slow if r in MATRICES else ()) for r in rules.names()],
)
Build = Callable[..., Transformer]
Surfaces = Callable[..., Surface]


def loss_of(model: nn.Module, view_names: list[str], ids: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the flat vector, written independently of `Surface`."""
    shapes = [dict(model.named_parameters())[name].shape for name in view_names]

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(view_names, parts, shapes, strict=True)}
        logits = functional_call(model, values, (ids[:, :-1],))
        logits = getattr(logits, "logits", logits)
        picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        return -picked.mean()

    return loss


def dense_hessian(surface: Surface, model: nn.Module, ids: Tensor) -> Tensor:
    """Rows of the Hessian by differentiating the gradient's entries, under plain attention."""
    loss = loss_of(model, surface.view.names, ids)
    theta = surface.weights.clone().requires_grad_()
    with math_attention():
        (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
        rows = [
            torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in gradient.unbind()
        ]
    return torch.stack(rows)


@every_rule
def test_ends_and_trace_are_those_of_the_dense_hessian(
    rule: str, small_model: Build, tokens: Tensor
) -> None:
    model = small_model(rule)
    surface = Surface(model, tokens, dtype=torch.float64)
    exact = dense_hessian(surface, model, tokens)
    assert (exact - exact.T).abs().max() <= 1e-10 * exact.abs().max()
    values = torch.linalg.eigvalsh(exact)
    scale = float(values.abs().max())
    found = extremes(surface.hessian, surface.size, count=3, tolerance=1e-9, basis=60)
    top = values.new_tensor([pair.value for pair in found.top])
    bottom = values.new_tensor([pair.value for pair in found.bottom])
    assert (top - values.flip(0)[:3]).abs().max() <= 1e-8 * scale
    assert (bottom - values[:3]).abs().max() <= 1e-8 * scale
    for pair in (*found.top, *found.bottom):
        assert pair.converged
        assert pair.residual <= 1e-9 * scale
    by_units = dense(surface.hessian, surface.size)
    assert (by_units - exact).abs().max() <= 1e-10 * exact.abs().max()
    assert abs(float(by_units.trace() - exact.trace())) <= 1e-10 * abs(float(exact.trace()))


WITH_A_STATE: dict[str, dict[str, Any]] = {
    "linear": {"chunk_size": 2},
    "momentum": {"chunk_size": 3, "mu_learned": "head", "gamma_learned": "model"},
    "adaptive_momentum": {"chunk_size": 2, "gamma_learned": "layer"},
}


def test_every_kind_of_attention_is_here() -> None:
    assert {"softmax", *WITH_A_STATE} == set(attention.names())


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow if k != "linear" else ()) for k in WITH_A_STATE],
)
def test_attention_with_a_state_has_the_dense_hessian_of_its_plain_forms(
    kind: str, small_model: Build, tokens: Tensor
) -> None:
    # products go back twice through the chunked kernels; the dense matrix is of the quadratic form
    # (adaptive: of the token recurrence)
    given = {"attention": kind, "attention_options": WITH_A_STATE[kind]}
    model = small_model("gradient_descent", **given)
    surface = Surface(model, tokens[:1], dtype=torch.float64)
    with ops.reference_forms():
        exact = dense_hessian(surface, model, tokens[:1])
    vector = torch.randn(surface.size, dtype=torch.float64)
    assert (surface.hessian(vector) - exact @ vector).norm() <= 1e-8 * (exact @ vector).norm()
    values = torch.linalg.eigvalsh(exact)
    found = extremes(surface.hessian, surface.size, count=2, tolerance=1e-9, basis=60)
    ends = values.new_tensor([pair.value for pair in (*found.top, *reversed(found.bottom))])
    expected = torch.cat((values[-2:].flip(0), values[:2].flip(0)))
    assert (ends - expected).abs().max() <= 1e-8 * values.abs().max()


@pytest.mark.parametrize(
    "fields",
    [pytest.param({}, id="plain"), pytest.param(CONTROLS, id="controls", marks=pytest.mark.slow)],
)
def test_torch_func_agrees_with_the_dense_hessian(
    fields: dict[str, Any], small_model: Build, tokens: Tensor
) -> None:
    model = small_model("nesterov", **fields)
    surface = Surface(model, tokens, dtype=torch.float64)
    with math_attention():
        exact = hessian(loss_of(model, surface.view.names, tokens))(surface.weights)
    assert (dense(surface.hessian, surface.size) - exact).abs().max() <= 1e-10 * exact.abs().max()


@every_rule
def test_gauss_newton_products_are_those_of_the_dense_matrix(
    rule: str, small_model: Build, tokens: Tensor
) -> None:
    model = small_model(rule)
    surface = Surface(model, tokens, dtype=torch.float64, rows=1)
    shapes = list(surface.view.shapes.values())

    def logits(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(surface.view.names, parts, shapes, strict=True)}
        return functional_call(model, values, (tokens[:, :-1],)).flatten(0, 1)

    with math_attention():
        jacobian = jacrev(logits)(surface.weights)  # (tokens, vocabulary, N)
    p = logits(surface.weights).detach().softmax(-1)
    inner = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    exact = torch.einsum("tvn,tvw,twm->nm", jacobian, inner, jacobian)
    for _ in range(3):
        vector = torch.randn(surface.size, dtype=torch.float64)
        error = surface.gauss_newton(vector) - exact @ vector
        assert error.norm() <= 1e-10 * (exact @ vector).norm()
    values = torch.linalg.eigvalsh(exact)
    found = extremes(
        surface.gauss_newton, surface.size, count=2, bottom=False, tolerance=1e-9, basis=40
    )
    assert found.bottom == ()
    for pair, value in zip(found.top, values.flip(0), strict=False):
        assert abs(pair.value - float(value)) <= 1e-8 * float(values[-1])


@pytest.mark.parametrize("rule", ["gradient_descent", "nesterov", "adamw"])
def test_a_groups_hessian_is_the_block_of_the_whole(
    rule: str, small_model: Build, tokens: Tensor
) -> None:
    model = small_model(rule)
    whole = Surface(model, tokens, dtype=torch.float64)
    exact = dense(whole.hessian, whole.size)
    places = dict(whole.view.slices())
    groups = parameter_groups(model)
    assert sorted(name for names in groups.values() for name in names) == sorted(places)
    assert list(groups) == [group for group in GROUPS if group in groups]
    assert ("scalars" in groups) == any(
        name.endswith("_raw") and parameter.requires_grad
        for name, parameter in model.named_parameters()
    )
    assert ("streams" in groups) == bool(len(model.streams))
    for names in groups.values():
        index = torch.cat([torch.arange(s.start, s.stop) for s in (places[n] for n in names)])
        part = Surface(model, tokens, names, dtype=torch.float64)
        block = dense(part.hessian, part.size)
        assert (block - exact[index][:, index]).abs().max() <= 1e-10 * exact.abs().max()


def test_eigsh_finds_the_same_ends(small_surface: Surfaces) -> None:
    surface = small_surface("triple_momentum")
    operator = LinearOperator(
        (surface.size, surface.size),
        matvec=lambda v: surface.hessian(torch.from_numpy(np.asarray(v).ravel())).numpy(),
        dtype=np.float64,
    )
    exact = np.sort(eigsh(operator, k=4, which="BE", tol=1e-12, return_eigenvectors=False))
    found = extremes(surface.hessian, surface.size, count=2, tolerance=1e-10)
    ours = np.sort([pair.value for pair in (*found.top, *found.bottom)])
    assert np.abs(ours - exact).max() <= 1e-9 * np.abs(exact).max()


def test_micro_batches_and_kept_graphs_change_nothing_but_rounding(small_surface: Surfaces) -> None:
    vector = torch.randn(small_surface("adam").size, dtype=torch.float64)
    first = small_surface("adam", rows=3).hessian(vector)
    for options in ({"rows": 1}, {"rows": 2, "kept_bytes": 0}, {"rows": 1, "kept_bytes": 300_000}):
        surface = small_surface("adam", **options)
        for _ in range(2):  # the second time from what is kept, if anything is
            assert (surface.hessian(vector) - first).norm() <= 1e-12 * first.norm()
        product = surface.gauss_newton(vector)
        assert (surface.gauss_newton(vector) - product).norm() <= 1e-12 * product.norm()


@every_rule
def test_float32_products_are_near_the_float64_ones(
    rule: str, small_model: Build, tokens: Tensor
) -> None:
    model = small_model(rule)
    exact = Surface(model, tokens, dtype=torch.float64)
    vector = torch.randn(exact.size, dtype=torch.float64)
    error = Surface(model, tokens).hessian(vector) - exact.hessian(vector)
    assert error.norm() <= 1e-3 * exact.hessian(vector).norm()


def test_weights_gradients_and_mode_are_left_bit_for_bit(
    small_model: Build, tokens: Tensor
) -> None:
    model = small_model("soap").float()
    before = copy.deepcopy(model.state_dict())
    surface = Surface(model, tokens)
    vector = torch.randn(surface.size, dtype=torch.float64)
    surface.hessian(vector)
    surface.gauss_newton(vector)
    surface.gradient(vector)
    surface.loss(vector)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert surface.loss() == Surface(model, tokens).loss()


def test_frozen_scalars_do_not_vary(small_model: Build, tokens: Tensor) -> None:
    model = small_model("nesterov", rule_options={"frozen": "mu"})
    names = Surface(model, tokens).view.names
    assert not any("mu_raw" in name for name in names)
    assert sum(name.endswith("_raw") for name in names) == 4


def test_a_hugging_face_model_works_and_its_groups_are_found(tokens: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=2, attn_implementation="sdpa"
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    surface = Surface(model, tokens, dtype=torch.float64)
    exact = dense_hessian(surface, model, tokens)
    assert (dense(surface.hessian, surface.size) - exact).abs().max() <= 1e-10 * exact.abs().max()
    groups = parameter_groups(model)
    assert set(groups) == {"embeddings", "attention", "mlp", "norms"}
    assert "transformer.ln_f.weight" in groups["norms"]
    assert "transformer.h.0.attn.c_proj.weight" in groups["attention"]
    with pytest.raises(ConfigError, match="dropout is on"):
        Surface(model.train(), tokens)


# What is refused


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return F.dropout(self.table(ids), 0.5, True)


def test_what_cannot_be_measured_is_refused_in_one_line(small_model: Build, tokens: Tensor) -> None:
    model = small_model("heavy_ball")
    for wrong, says in (
        (small_model("heavy_ball", dropout=0.1).train(), "dropout is on"),
        (Noisy(), "not deterministic"),
        (small_model("heavy_ball", causal=False), "not causal"),
        (nn.Embedding(11, 11).requires_grad_(False), "no parameters to look at"),
        (nn.Sequential(nn.Embedding(11, 4), nn.Flatten()), "not a causal language model"),
    ):
        with pytest.raises(ConfigError, match=says) as error:
            Surface(wrong, tokens)
        assert "\n" not in str(error.value)
    for ids, says in (
        (tokens[:0], "no tokens to look at"),
        (tokens[:, :1], "no tokens to look at"),
        (tokens.double(), "must be integers"),
        (tokens + 11, "outside the model's tables"),
    ):
        with pytest.raises(DataError, match=says):
            Surface(model, ids)
    for options, says in (
        ({"dtype": torch.bfloat16}, "must be float32 or float64"),
        ({"rows": 0}, "rows=0 must be a whole number of at least 1"),
        ({"names": ["head.weight"]}, "has no parameter 'head.weight'"),
        ({"names": []}, "no parameters to look at"),
    ):
        with pytest.raises(ConfigError, match=says):
            Surface(model, tokens, **options)
    broken = small_model("heavy_ball")
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        Surface(broken, tokens)
