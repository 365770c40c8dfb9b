"""The equation that a rule shows in tables, read as mathematics, is its step.

`x ← x + νv` is one statement; letters are scalars, streams or values that a statement before gave,
and neighbours are multiplied. Statements take effect in turn, as one reads them.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak import rules

LETTERS = {"β": "beta", "γ": "gamma", "μ": "mu", "ν": "nu", "φ": "phi", "λ": "lambda_", "ε": "eps"}
DIGITS = str.maketrans("₁₂", "12")
TOKEN = re.compile(r"cos|sin|LN|[A-Za-zβγμνφλε][₁₂]?|\d+|[()+·/√²−]")
READ = (
    *("gradient_descent", "heavy_ball", "nesterov", "triple_momentum"),
    *("residual_momentum", "rmsprop", "adam", "spherical"),
)
"""Rules whose equation is whole: it refers to no other rule's, and to no matrix function."""


def python_of(expression: str) -> str:
    """`v + sin φ·u` → `v+sin(phi)*u`."""
    words: list[str] = []
    ended = False  # whether the word before ends a factor
    pending = 0  # functions whose argument has no brackets
    tokens = TOKEN.findall(expression)
    assert "".join(tokens) == expression.replace(" ", ""), expression
    for place, token in enumerate(tokens):
        function = token in ("cos", "sin", "LN", "O", "√")
        starts = function or token == "(" or (token != "²" and token[0].isalnum())
        if starts and ended:
            words.append("*")
        ended = not function and token not in "(+·/−"
        if token == "²":
            words.append("**2")
        elif function:
            words.append("sqrt" if token == "√" else token)
            if tokens[place + 1] != "(":
                words.append("(")
                pending += 1
        else:
            name = LETTERS.get(token[0], token[0]) + token[1:].translate(DIGITS)
            words.append({"·": "*", "−": "-"}.get(token, name))
            if pending and token[0].isalpha():
                words.append(")")
                pending -= 1
    return "".join(words)


def test_the_reader_reads() -> None:
    assert python_of("LN(βv + γO(x + μv))") == "LN(beta*v+gamma*O(x+mu*v))"
    assert python_of("cos φ·v + sin φ·u") == "cos(phi)*v+sin(phi)*u"
    assert python_of("β₂s + (1−β₂)g²") == "beta2*s+(1-beta2)*g**2"
    assert python_of("m/(√s + ε)") == "m/(sqrt(s)+eps)"


@pytest.mark.parametrize("rule", READ)
def test_a_step_is_the_equation(rule: str) -> None:
    kind = rules.get(rule)
    one = kind(12, 3, options={"frozen": "none"}).double()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, g, *streams = torch.rand(2 + len(kind.streams), 2, 5, 12, dtype=torch.float64) + 0.1

    def oracle(y: Tensor) -> Tensor:
        return g * y.sin()

    moved, state = one.step(x, kind.State(*streams), oracle)
    known: dict[str, Any] = {
        "x": x,
        "O": oracle,
        "LN": one.norm if kind.norms else None,
        "cos": torch.cos,
        "sin": torch.sin,
        "sqrt": torch.sqrt,
        "eps": 1e-8,
        **dict(zip((stream.name for stream in kind.streams), streams, strict=True)),
        **{name: getattr(one, name) for name in kind.present_scalars(one.options)},
    }
    known["g"] = oracle(x)
    for statement in kind.equation.split(";"):
        name, expression = re.split("[←=]", statement)
        known[name.strip()] = eval(python_of(expression.strip()), known)
    assert (moved - known["x"]).abs().max() < 1e-9
    for stream in kind.streams:
        assert (getattr(state, stream.name) - known[stream.name]).abs().max() < 1e-9
