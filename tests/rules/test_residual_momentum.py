"""The Momentum Transformer's residual momentum, as released and where the release has NaN."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from polyak import ops, rules
from polyak.errors import ConfigError
from polyak.rules import UpdateRule
from polyak.rules._conjugate import DELTA, KINDS

FOLDER = Path(__file__).parents[1] / "conformance" / "momentum_transformer"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["hyperparameters"])


def double(name: str, **options: Any) -> UpdateRule:
    """A rule whose coefficients are exact in float64."""
    rule = rules.get(name)(12, 3, options=options).double()
    with torch.no_grad():
        for scalar, kind in rule.present_scalars(rule.options).items():
            raw: Any = kind.raw_of(options.get(scalar, kind.initial))
            getattr(rule, f"{scalar}_raw").fill_(raw)
    return rule


def rule_of(given: dict[str, Any]) -> UpdateRule:
    """The rule of a vector's attention substep."""
    if "adaptive" in given:
        return double("adaptive_residual_momentum", kind=given["adaptive"], s=given["s_r"])
    if "s_r" in given:
        return double("residual_momentum", mu=given["mu_r"], s=given["s_r"])
    return double("gradient_descent")


class Layer:
    """A post-norm layer of the release from public pieces; the rule steps on attention alone."""

    def __init__(self, weights: dict[str, Tensor], given: dict[str, Any], attend: Attend) -> None:
        self.weights, self.given, self.attend = weights, given, attend
        self.rule = rule_of(given)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        shape, eps = x.shape[-1:], self.given["layernorm_eps"]
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, shape, weight, bias, eps)

    def attention(self, x: Tensor) -> Tensor:
        heads = (
            self.linear(f"attention.{name}", x).unflatten(-1, (self.given["heads"], -1))
            for name in "qkv"
        )
        return self.linear("attention.out", self.attend(*heads).flatten(-2))

    def __call__(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        moved, after = self.rule.step(x, state, self.attention)
        if self.given.get("is_resw"):  # which the rules do not have: v′ is theirs
            moved = self.linear("resw_x", x) - self.given["s_r"] * self.linear("resw_v", after.v)
        x = self.norm("norm_attention", moved)
        activation = F.gelu if self.given.get("activation") == "gelu" else F.relu
        inside = self.linear("ffn.down", activation(self.linear("ffn.up", x)))
        return self.norm("norm_ffn", x + inside), after


def conforms(out: Tensor, tensors: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    assert relative(out, tensors["out"]) < 1e-10
    wanted = {name.removeprefix("grad."): t for name, t in tensors.items() if name[:5] == "grad."}
    assert len(wanted) >= 4
    found = torch.autograd.grad(out, [inputs[name] for name in wanted], tensors["cotangent"])
    for (name, expected), gradient in zip(wanted.items(), found, strict=True):
        assert relative(gradient, expected) < 1e-10, name


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.abs().max())


def leaves(tensors: dict[str, Tensor], *names: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs that have gradients, and the weights among them without their prefix."""
    inputs = {
        name: tensor.clone().requires_grad_()
        for name, tensor in tensors.items()
        if name in names or name.startswith("weight.")
    }
    return inputs, {n.removeprefix("weight."): t for n, t in inputs.items()}


@pytest.mark.parametrize(
    "name",
    ["momentum", "momentum_resw", *(f"adaptive_{kind}" for kind in KINDS), "adaptive_nc_resw"],
)
def test_a_released_layer_is_the_rule_on_its_attention(name: str) -> None:
    tensors, given = load(f"layer_{name}")
    inputs, weights = leaves(tensors, "x", "v", "g_prev")
    layer = Layer(weights, given, lambda q, k, v: ops.linear_attention(q, k, v))
    streams = {key: inputs[key] for key in ("v", "g_prev") if key in inputs}
    x, state = layer(inputs["x"], layer.rule.State(**streams))
    if "mu" in tensors:
        assert given["delta"] == DELTA
        mu = (state.v + state.g_prev) / streams["v"]  # v′ + g = μv
        assert relative(mu.mean(-1, keepdim=True), tensors["mu"]) < 1e-9
    conforms(torch.cat([x, *state], dim=-1), tensors, inputs)


ATTENTION: dict[str, Callable[[dict[str, Any]], Attend]] = {
    "linear": lambda given: (
        lambda q, k, v: ops.linear_attention(q, k, v, key_mask=given["key_mask"])
    ),
    "momentum": lambda given: (
        lambda q, k, v: ops.momentum_attention(q, k, v, mu=given["mu"], gamma=given["gamma"])
    ),
    "adaptive": lambda given: (
        lambda q, k, v: ops.adaptive_momentum_attention(q, k, v, gamma=given["gamma"])
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        "stack_plain",
        "stack_momentum",
        "stack_adaptive",
        "decoder_plain_residual_momentum_attention",
        "decoder_adaptive_residual_momentum_attention",
        "decoder_adaptive_residual_adaptive_attention",
    ],
)
def test_released_layers_share_one_velocity_along_depth(name: str) -> None:
    tensors, given = load(name)
    inputs, weights = leaves(tensors, "x")
    if "lengths" in tensors:
        given["key_mask"] = torch.arange(tensors["x"].shape[1]) < tensors["lengths"][:, None]
    attend = ATTENTION[given.get("attention", "linear")](given)
    x, state = inputs["x"], None
    for index in range(given["layers"]):
        own = {
            name.removeprefix(f"layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{index}.")
        }
        layer = Layer(own, given, attend)
        if state is None:  # v = 0 and g_prev = 0, as the rule's streams start
            starts = (stream.constant(x, 3) for stream in layer.rule.streams)
            state = layer.rule.State(*starts)
        x, state = layer(x, state)
    conforms(Layer(weights, given, attend).norm("norm_final", x), tensors, inputs)


def reference_mu(kind: str, g: Tensor, before: Tensor, v: Tensor) -> float:
    """One token's coefficient as the equations have it, its edge cases by themselves."""
    e = g - before
    if not v.any():
        return 0.0
    if kind == "nc":
        mu = float((1 - (e.norm() / v.norm()).sqrt()) ** 2)
    elif kind in ("fr", "pr") and not before.any():
        mu = 0.0 if kind == "pr" and not g.any() else float("inf")
    elif kind in ("hs", "dy") and float(v @ e) == 0:
        mu = 0.0
    else:
        over, under = {
            "fr": (g @ g, before @ before),
            "pr": (g @ e, before @ before),
            "hs": (g @ e, v @ e),
            "dy": (g @ g, v @ e),
        }[kind]
        mu = float(over / under)
    return min(max(mu, 0.0), 1 - DELTA)


@pytest.mark.parametrize("kind", KINDS)
def test_edge_cases_are_each_tokens_own_in_value_and_gradient(kind: str) -> None:
    rule = double("adaptive_residual_momentum", kind=kind, s=0.9)
    x, v, before, g = torch.randn(4, 1, 8, 12, dtype=torch.float64)
    v[0, 0] = 0  # before the first step
    v[0, 1], g[0, 1] = 0, before[0, 1]
    g[0, 2] = before[0, 2]  # the oracle says the same again
    v[0, 4], g[0, 4], before[0, 4] = 0, 0, 0
    v[0, 4, 0], g[0, 4, 1], before[0, 4, 2] = 1, 1, 1  # v·e = 0 without rounding
    before[0, 5] = 0
    before[0, 6], g[0, 6] = 0, 0
    inputs = [t.requires_grad_() for t in (x, v, before, g)]

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        x, v, before, g = given
        moved, after = rule.step(x, rule.State(v=v, g_prev=before), lambda _: g)
        return moved, *after

    moved, velocity, kept = step(*inputs)
    expected = [reference_mu(kind, *(t.detach()[0, i] for t in (g, before, v))) for i in range(8)]
    mu = torch.tensor(expected, dtype=torch.float64)[None, :, None]
    assert (velocity - (mu * v - g)).abs().max() < 1e-9
    assert (moved - (x - 0.9 * velocity)).abs().max() < 1e-12
    assert torch.equal(kept, g)
    first = torch.autograd.grad(
        (velocity * torch.randn_like(velocity)).sum(), inputs[1:], create_graph=True
    )
    assert all(gradient.isfinite().all() for gradient in first)
    squares = torch.stack([(gradient * gradient).sum() for gradient in first]).sum()
    second = torch.autograd.grad(squares, inputs[1:], retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in second)
    # where mu is a limit, it passes no gradient on
    zero, one = velocity.detach() * 0, torch.ones_like(velocity)
    limits = {"nc": [0, 1, 2, 6], "fr": [0, 1, 2, 5, 6], "pr": [0, 1, 5, 6]}
    for token in limits.get(kind, [0, 1, 2, 4, 6]):
        mask = zero.clone()
        mask[0, token] = one[0, token]
        _, by_before, by_g = torch.autograd.grad(
            (velocity * mask).sum(), inputs[1:], retain_graph=True
        )
        assert torch.equal(by_before, zero)
        assert torch.equal(by_g, -mask)


def test_the_first_step_is_the_same_for_every_kind_whatever_the_oracle_said_before() -> None:
    x, g, before = torch.randn(3, 2, 5, 12, dtype=torch.float64)
    for kind in KINDS:
        rule = double("adaptive_residual_momentum", kind=kind)
        for kept in (before, torch.ones_like(x), torch.zeros_like(x)):
            state = rule.State(v=torch.zeros_like(x), g_prev=kept)
            moved, after = rule.step(x, state, lambda _: g)
            assert torch.equal(after.v, -g)
            assert (moved - (x + 0.99 * g)).abs().max() < 1e-12


def test_the_coefficients_are_fixed_unless_they_are_to_be_learned() -> None:
    for name, scalars in (
        ("residual_momentum", {"mu", "s"}),
        ("adaptive_residual_momentum", {"s"}),
    ):
        kind = rules.get(name)
        assert set(kind.resolve({})["frozen"]) == scalars
        assert not any(p.requires_grad for p in kind(12, 3).parameters())
        for text in ("none", ()):
            learned = kind(12, 3, options={"frozen": text})
            assert {n for n, p in learned.named_parameters() if p.requires_grad} == {
                f"{scalar}_raw" for scalar in scalars
            }
    half = rules.get("residual_momentum")(12, 3, options={"frozen": "mu"})
    assert {n for n, p in half.named_parameters() if p.requires_grad} == {"s_raw"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("residual_momentum", {"mu": 1.0}, r"mu=1.0: its initial value must be a number in \(0, 1"),
        ("residual_momentum", {"mu": -0.1}, r"mu=-0.1: its initial value must be a number in"),
        ("adaptive_residual_momentum", {"kind": "wang"}, "kind='wang' of adaptive_residual_mo"),
        ("adaptive_residual_momentum", {"mu": 0.5}, "unknown option of rule adaptive_residual"),
    ],
)
def test_options_that_cannot_be_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        rules.get(name).resolve(options)
