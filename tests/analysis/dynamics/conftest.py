from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak import ModelConfig, Transformer

TINY: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "d_model": 8,
    "vocab_size": 11,
    "context_length": 6,
}


@pytest.fixture
def tiny() -> Callable[..., Transformer]:
    """A tiny float64 model, every weight off its initial value."""

    def build(**fields: Any) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**{**TINY, **fields})).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def ids() -> Tensor:
    """(4, 7) ids below 11."""
    return torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(1))
