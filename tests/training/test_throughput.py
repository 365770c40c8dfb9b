"""The measured matmul rate and the memory held."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from polyak.training.machine import peak_memory_bytes
from polyak.training.throughput import matmul_peak, memory_bytes

CPU = torch.device("cpu")


def test_the_peak_is_near_a_product_timed_by_hand_and_measured_in_under_a_second() -> None:
    began = time.process_time()
    peak = matmul_peak(CPU, torch.float32)
    assert time.process_time() - began < 1.0
    a = torch.rand(512, 512)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    # other tests run beside this one: the order of magnitude is what can be checked
    assert 0.1 < peak / (2 * 512**3 / min(seconds)) < 3


def test_the_peak_is_measured_once_for_each_dtype() -> None:
    first = matmul_peak(CPU, torch.float32)
    assert matmul_peak(CPU, torch.float32) == first
    assert matmul_peak(CPU, torch.float64) != first


def test_measuring_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    matmul_peak(CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_grows_with_what_is_held_and_the_peak_stays_above_it() -> None:
    before = memory_bytes(CPU)
    if before is None:
        pytest.skip("this system does not tell how much memory is held")
    held = np.ones(256 * 2**20, dtype=np.uint8)
    now, peak = memory_bytes(CPU), peak_memory_bytes()
    assert now is not None
    assert peak is not None
    # the kernel counts in batches, and the two at different moments
    assert now - before > 0.6 * held.nbytes
    assert peak > 0.9 * now


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts otherwise")
def test_the_peak_of_a_process_is_its_own_and_not_its_parents() -> None:
    code = """
import subprocess, sys
held = bytearray(600 << 20)
held[:: 4096] = b"x" * len(held[:: 4096])
child = "from polyak.training.machine import peak_memory_bytes; print(peak_memory_bytes())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout) < 500 << 20
