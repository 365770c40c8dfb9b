from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak import ModelConfig, Transformer
from polyak.analysis.hessian import Surface

SMALL = {
    "num_layers": 1,
    "num_heads": 2,
    "d_model": 4,
    "vocab_size": 11,
    "context_length": 4,
}


@pytest.fixture
def tokens() -> Tensor:
    """(3, 5) ids below 11."""
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def small_model() -> Callable[..., Transformer]:
    """At most 2,000 parameters, float64, every weight off its initial value."""

    def build(rule: str, **fields: Any) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(rule=rule, **{**SMALL, **fields})).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        assert sum(p.numel() for p in model.parameters()) <= 2000
        return model

    return build


@pytest.fixture
def small_surface(
    small_model: Callable[..., Transformer], tokens: Tensor
) -> Callable[..., Surface]:
    """The float64 loss of a small model of a rule."""

    def build(rule: str, **options: Any) -> Surface:
        return Surface(small_model(rule), tokens, dtype=torch.float64, **options)

    return build
