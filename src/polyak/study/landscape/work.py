"""What the measurements of a study take, in seconds: for what is said before, and the time left."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F

from polyak.evaluation.subjects import Subject, token_set

PRODUCT = 3.5
"""A Hessian product takes about so many losses with gradients, measured on the quick model."""
PRODUCTS = 260
"""Typical products of one model's sharpness."""
SEQUENCES = 500
"""A spectrum takes about as long as so many losses with gradients of its sequence, per layer."""
FIXED = 1.5
"""For the page, and for what torch loads when it trains first: most of what tiny runs take."""


def tokens_per_second(subject: Subject) -> float:
    """Tokens/s of a loss with its gradient, the best of some tries: the first ones warm up."""
    length = subject.context_length
    ids = token_set(subject, tokens=8 * length).ids.to(subject.device)
    took = math.inf
    for _ in range(5):
        began = time.perf_counter()
        logits = subject.model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        weights = [p for p in subject.model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, weights, allow_unused=True)
        took = min(took, time.perf_counter() - began)
    return ids[:, 1:].numel() / took


def losses(tokens: int, speed: float) -> float:
    """Of losses alone, without a backward pass."""
    return tokens / 3 / speed


def sharpness(tokens: int, speed: float) -> float:
    """Of one model's sharpness."""
    return PRODUCTS * PRODUCT * tokens / speed


def spectrum(layers: int, tokens: int, speed: float) -> float:
    """Of one model's Jacobians."""
    return SEQUENCES * layers * tokens / speed
