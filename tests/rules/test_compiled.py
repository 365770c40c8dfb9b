"""torch.compile changes nothing but speed.

Rules of every form are captured into graphs, forward and backward, by the ahead-of-time tracer;
where `slow` tests run, every rule is, and compiled to native code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from polyak import Transformer, rules

WITH_BREAKS = ("muon", "ortho", "shampoo", "soap")
"""Their matrix functions have forward-mode derivatives of their own, which the tracer cannot take
in (torch 2.13): the graph breaks there and they run as they are."""
FORMS = ("gradient_descent", "triple_momentum", "adamw", "soap", "adaptive_residual_momentum")
"""Without streams, looking ahead, with two moments, with a matrix a token, without parameters."""
Build = Callable[..., Transformer]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(rule: str, backend: str, tiny_model: Build) -> None:
    model = tiny_model(rule)
    whole = rule in rules._registry.RULES.own_names and rule not in WITH_BREAKS
    block = model.blocks[0]
    compiled = torch.compile(block, backend=backend, fullgraph=whole)
    x, state = model.start(torch.randint(11, (2, 7)))

    def run(call: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]) -> list[Tensor]:
        y, after = call(x, state)
        total = sum(((out * out).sum() for out in after), (y**3).sum())
        parameters = [p for p in block.parameters() if p.requires_grad]
        grads = torch.autograd.grad(total, parameters, retain_graph=True)
        return [y.detach(), *(out.detach() for out in after), *grads]

    for eager, fast in zip(run(block), run(compiled), strict=True):
        assert (eager - fast).abs().max() <= 1e-10 * max(1.0, float(eager.abs().max()))


@pytest.mark.parametrize(
    "rule",
    [pytest.param(r, marks=() if r in FORMS else pytest.mark.slow) for r in rules.names()],
)
def test_a_block_captured_into_graphs_is_the_same_function(rule: str, tiny_model: Build) -> None:
    check(rule, "aot_eager", tiny_model)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
@pytest.mark.parametrize("rule", rules.names())
def test_a_compiled_block_is_the_same_function(rule: str, tiny_model: Build) -> None:
    check(rule, "inductor", tiny_model)
