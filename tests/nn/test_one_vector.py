"""Products laid out for one vector are the products, and blocks are whole."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from polyak.nn.decoding.one_vector import LARGE, blocks, is_large, product


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("rows", [1, 2, 7, 768, 2304, 50257, 50304, 1_000_003])
def test_blocks_divide_the_rows(rows: int, threads: int) -> None:
    count = blocks(rows, threads)
    assert rows % count == 0
    divisors = [n for n in range(1, 32 * max(2, threads) + 1) if rows % n == 0]
    enough = [n for n in divisors if n >= max(2, threads)]
    assert count == (min(enough) if enough else max(divisors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("out", "width"), [(5, 3), (384, 128), (521, 257), (1042, 256), (29, 9999)]
)
def test_a_product_is_the_linear_layer(
    out: int, width: int, bias: bool, dtype: torch.dtype
) -> None:
    weight, x = torch.randn(out, width, dtype=dtype), torch.randn(1, 1, width, dtype=dtype)
    offset = torch.randn(out, dtype=dtype) if bias else None
    found = product(weight, offset)(x)
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    assert found.shape == (1, 1, out)
    assert (found.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * width
    into = torch.empty_like(found)
    product(weight, offset, into)(x)
    assert torch.equal(into, found)


def test_large_matrices_are_not_copied() -> None:
    weight = torch.zeros(LARGE // 256, 256)
    assert is_large(weight)
    multiply = product(weight, None)
    weight += 1  # it sees the change
    assert torch.equal(multiply(torch.ones(1, 1, 256)), torch.full((1, 1, LARGE // 256), 256.0))


@pytest.mark.slow
def test_large_matrices_are_not_multiplied_much_slower_than_by_torch() -> None:
    # a change of strides alone once made it six times slower, with the same result; on some CPUs
    # torch's own product is the faster one, by a third
    weights, x = [torch.randn(2304, 768) for _ in range(16)], torch.randn(1, 1, 768)
    products = [product(weight, None) for weight in weights]

    def seconds(run: object) -> float:
        began = time.perf_counter()
        for weight, multiply in zip(weights, products, strict=True):
            F.linear(x, weight) if run == "torch" else multiply(x)
        return time.perf_counter() - began

    pairs = [(seconds("torch"), seconds("ours")) for _ in range(20)]
    assert min(ours for _, ours in pairs) < 3 * min(theirs for theirs, _ in pairs)
