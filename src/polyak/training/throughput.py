"""What the hardware can do, to compare training with: a measured matmul rate, and memory held."""

from __future__ import annotations

import statistics
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

WARM_UP, REPEATS = 3, 7
LONGEST = 0.01
"""Seconds that one timed product may take, unless it is the smallest: less than a time slice."""
SMALLEST = 512
LARGEST = {"cpu": 1024, "cuda": 8192}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products: the rate that training is given as a fraction of.

    The median of 7 products of n×n matrices of uniform numbers, at 2n³ FLOPs each, after three
    that are not counted. n is the largest power of two for which a product takes at most 10 ms,
    but at least 512, and at most 1024 on CPU or 8192 on CUDA: a fifth of a second on all but
    the slowest processors. It is made once per process for each device, dtype and number of
    threads, and leaves the random state alone.

    It is what this process reaches at that moment with torch's own settings
    (`torch.set_float32_matmul_precision`, threads), not the vendor's figure: work beside it
    lowers it, and a boosted clock raises it.

    Args:
        device: where to multiply; CPU or CUDA.
        dtype: of the matrices; bfloat16 for a model under bfloat16 autocast.

    Returns:
        FLOPs per second.
    """
    return _measured(device.type, device.index, dtype, torch.get_num_threads())


@cache
def _measured(kind: str, index: int | None, dtype: torch.dtype, threads: int) -> float:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    largest, n = LARGEST.get(kind, LARGEST["cpu"]), SMALLEST
    while True:
        a, b, out = _matrices(n, device, dtype)
        # the first loads kernels; of the others, the best is least disturbed by work beside it
        best = min(_seconds(a, b, out) for _ in range(WARM_UP))
        if n >= largest or 8 * best > LONGEST:
            break
        n *= 2
    return 2 * n**3 / statistics.median(_seconds(a, b, out) for _ in range(REPEATS))


def _matrices(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    # not zeros: they draw less power on a GPU, which then clocks higher than it does in training
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(n, n, generator=draw, device=device).to(dtype) for _ in range(2))
    return a, b, torch.empty_like(a)


@torch.no_grad()
def _seconds(a: Tensor, b: Tensor, out: Tensor) -> float:
    _finish(a.device)
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    _finish(a.device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device | None = None) -> int | None:
    """Memory held now: allocated by tensors on a CUDA device, else resident; None if unknown.

    `polyak.training.machine.peak_memory_bytes` is the largest so far.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        import resource

        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return resident * resource.getpagesize()
    except (ImportError, OSError):  # Windows and macOS tell it by other ways
        return None
