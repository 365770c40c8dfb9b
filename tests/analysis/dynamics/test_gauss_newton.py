"""Gauss–Newton's share: 1 where logits are linear in the weights; dense matrices elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polyak import Transformer
from polyak.analysis.dynamics.gauss_newton import share_of
from polyak.analysis.hessian import Surface, dense
from polyak.errors import DataError


def test_of_weights_in_which_logits_are_linear_it_is_everything(
    small_model: Callable[..., Transformer], tokens: Tensor
) -> None:
    model = small_model("gradient_descent", tie_embeddings=False)
    surface = Surface(model, tokens, ["head.weight"], dtype=torch.float64)
    found = share_of(surface, probes=3)
    for one, expected in ((found.trace, 1), (found.size, 1), (found.cosine, 1), (found.rest, 0)):
        assert one is not None
        assert one.value == pytest.approx(expected, abs=1e-6)
    assert found.top == pytest.approx(1, abs=1e-9)
    assert found.top_hessian.converged


def test_shares_are_those_of_the_dense_matrices(
    small_model: Callable[..., Transformer], tokens: Tensor
) -> None:
    names = ["blocks.0.mlp.down.weight", "blocks.0.mlp.norm.weight", "norm.weight"]
    surface = Surface(small_model("heavy_ball"), tokens, names, dtype=torch.float64)
    h, g = (dense(surface.operator(kind), surface.size) for kind in ("hessian", "gauss_newton"))  # type: ignore[arg-type]
    found = share_of(surface, probes=64, tolerance=1e-8)
    for one, expected in (
        (found.trace, g.trace() / h.trace()),
        (found.rest, (h - g).norm() / h.norm()),
        (found.size, g.norm() / h.norm()),
        (found.cosine, (h * g).sum() / h.norm() / g.norm()),
    ):
        assert one is not None
        assert abs(one.value - float(expected)) < 2 * one.half_width
    tops = [float(torch.linalg.eigvalsh(matrix)[-1]) for matrix in (g, h)]
    assert found.top_gauss_newton.value == pytest.approx(tops[0], rel=1e-8)
    assert found.top_hessian.value == pytest.approx(tops[1], rel=1e-8)
    assert found.top == pytest.approx(tops[0] / tops[1], rel=1e-8)


def test_the_output_s_gradient_is_p_minus_the_truth(
    small_model: Callable[..., Transformer], tokens: Tensor
) -> None:
    model = small_model("gradient_descent")
    found = share_of(Surface(model, tokens, ["norm.weight"], dtype=torch.float64), probes=2)
    p = model(tokens[:, :-1]).softmax(-1)
    truth = torch.nn.functional.one_hot(tokens[:, 1:], p.shape[-1])
    assert found.output_gradient.value == pytest.approx(
        float((p - truth).norm(dim=-1).mean().detach())
    )


def test_one_sequence_has_no_error(small_model: Callable[..., Transformer], tokens: Tensor) -> None:
    with pytest.raises(DataError, match="errors are over sequences"):
        share_of(Surface(small_model("gradient_descent"), tokens[:1], ["norm.weight"]))
