"""Each rule's docstring says what it reduces to; here the two models are run side by side.

Raw parameters sit at the exact limits: σ(±∞) is 0 or 1, softplus(ln(e − 1)) is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyak import Transformer, rules
from polyak.rules import Oracle, State, Stream, UpdateRule, state_norm, unconstrained

Build = Callable[..., Transformer]
ZERO, ONE = -math.inf, math.inf
SOFTPLUS_ONE = math.log(math.e - 1)


@dataclass(frozen=True)
class Reduction:
    """A rule, with these raw scalars and fields, is `to` with those fields.

    `renamed`: what `to` calls a scalar that has another name there.
    """

    to: str
    raw: dict[str, float] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    to_fields: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-12
    renamed: dict[str, str] = field(default_factory=dict)

    def named(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the names of `to`."""
        found = {}
        for name, value in values.items():
            for ours, theirs in self.renamed.items():
                name = name.replace(f".{ours}_raw", f".{theirs}_raw")
            found[name] = value
        return found


WRAPPER: dict[str, Any] = {"rule_options": {"update_norm": "layer"}, "norm_eps": 0.0}
EXACT: dict[str, Any] = {"norm_eps": 0.0}  # LayerNorm ignores the scale of its input at eps 0
REDUCTIONS = {
    "heavy_ball": Reduction(
        "gradient_descent",
        {"beta": ZERO, "gamma": SOFTPLUS_ONE},
        {"rule_options": {"state_norm": "none"}},
    ),
    "nesterov": Reduction("heavy_ball", {"mu": ZERO}),
    "triple_momentum": Reduction("nesterov", {"nu": SOFTPLUS_ONE}),
    "rmsprop": Reduction("gradient_descent", {"beta2": ONE}, EXACT, WRAPPER, 1e-9),
    "adam": Reduction("rmsprop", {"beta1": ZERO}),
    "adamw": Reduction("adam", {"lambda_": ZERO}),
    "ortho": Reduction(
        "gradient_descent", {}, {**EXACT, "num_heads": 1}, {**WRAPPER, "num_heads": 1}, 1e-9
    ),
    "muon": Reduction("ortho", {"beta": ZERO}),
    "shampoo": Reduction("gradient_descent", {"betaR": ONE}, EXACT, WRAPPER, 1e-9),
    "soap": Reduction("shampoo", {"beta1": ZERO}),
    "residual_momentum": Reduction("gradient_descent", {"mu": ZERO, "s": SOFTPLUS_ONE}),
    "spherical": Reduction(
        "gradient_descent",
        {"phi": ONE},
        to_fields={"rule_options": {"update_norm": "layer"}},
        renamed={"nu": "gamma"},
    ),
}


def logits_and_gradients(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    logits = model(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    return {"logits": logits} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def set_raw(model: Transformer, raw: dict[str, float]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scalar = name.rpartition(".")[2].removesuffix("_raw")
            if name.endswith("_raw") and scalar in raw:
                parameter.fill_(raw[scalar])


def test_every_reduction_that_a_docstring_states_is_computed_here() -> None:
    stated = {n for n in rules.names() if "Reduction:" in (rules.get(n).__doc__ or "")}
    assert stated == set(REDUCTIONS)


@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
@pytest.mark.parametrize("rule", REDUCTIONS)
def test_reduction_of_the_docstring(rule: str, splitting: str, tiny_model: Build) -> None:
    reduction, ids = REDUCTIONS[rule], torch.randint(11, (3, 7))
    model = tiny_model(rule, splitting=splitting, **reduction.fields)
    target = tiny_model(reduction.to, splitting=splitting, **reduction.to_fields)
    before = model(ids)
    set_raw(model, reduction.raw)
    state = reduction.named(model.state_dict())
    assert not target.load_state_dict(state, strict=False).missing_keys
    ours = reduction.named(logits_and_gradients(model, ids))
    theirs = logits_and_gradients(target, ids)
    for name, expected in theirs.items():
        scale = max(1.0, float(expected.detach().abs().max()))
        assert (ours[name] - expected).abs().max() <= reduction.tolerance * scale, name
    if reduction.raw:  # away from the limit the two differ: the test can fail
        assert (before - theirs["logits"]).abs().max() > 1e-3


def test_spherical_frozen_at_a_right_angle_is_the_wrapper_as_a_user_writes_it(
    tiny_model: Build,
) -> None:
    ids = torch.randint(11, (3, 7))
    wrapper = tiny_model("gradient_descent", rule_options={"update_norm": "layer"})
    for options in ({}, {"coefficients": "unconstrained"}):
        angle = {"phi": 1.5707963, "frozen": ("phi",), **options}
        model = Transformer(replace(wrapper.config, rule="spherical", rule_options=angle)).double()
        with torch.no_grad():
            for name, value in wrapper.named_parameters():
                nu = F.softplus(value) if options else value
                theirs = name.replace(".gamma_raw", ".nu_raw")
                model.get_parameter(theirs).copy_(nu if theirs != name else value)
        assert (model(ids) - wrapper(ids)).abs().max() < 1e-6


@pytest.mark.parametrize("rule", ["heavy_ball", "nesterov", "triple_momentum"])
def test_the_velocity_depends_on_the_ratio_of_beta_and_gamma_only(
    rule: str, tiny_model: Build
) -> None:
    ids = torch.randint(11, (3, 7))
    model, scaled = (tiny_model(rule, norm_eps=0.0) for _ in range(2))
    scaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        for block in scaled.blocks:
            for substep in block.rules.values():
                beta, gamma = 0.37 * substep.beta, 0.37 * substep.gamma
                substep.beta_raw.copy_(torch.logit(beta))
                substep.gamma_raw.copy_(gamma.expm1().log())
    assert (scaled(ids) - model(ids)).abs().max() < 1e-10


@pytest.mark.parametrize("rule", ["heavy_ball", "nesterov", "triple_momentum"])
def test_with_eps_the_ratio_decides_once_eps_is_scaled_too(rule: str) -> None:
    x, v, g = torch.randn(3, 2, 5, 12, dtype=torch.float64)
    c, eps = 0.37, 1e-2
    steps = []
    for scale in (1.0, c):
        options = {"beta": 0.6 * scale, "gamma": 0.9 * scale}
        one = rules.get(rule)(12, 3, norm_eps=eps * scale**2, options=options).double()
        unscaled = rules.get(rule)(12, 3, norm_eps=eps, options=options).double()
        state = one.State(v=v)
        steps.append((one.step(x, state, lambda _: g), unscaled.step(x, state, lambda _: g)))
    (first, plain), (second, other) = steps
    assert (first[1].v - second[1].v).abs().max() < 1e-7  # scalars are stored in float32
    assert (plain[1].v - other[1].v).abs().max() > 1e-4


class FreeNesterov(UpdateRule):
    """v ← LN(ρv + O(x + μv)); x ← x + v, with any ρ = β/γ and any μ."""

    streams = (Stream("v"),)
    mu, rho = unconstrained(0.0), unconstrained(1.0)
    norm = state_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        g = oracle(x + self.mu * state.v)
        v = self.norm(self.rho * state.v + g)
        return x + v, state.replace(v=v)


@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
def test_triple_momentum_is_nesterov_with_mu_allowed_past_one(
    splitting: str, tiny_model: Build, registered: Callable[[str, type[UpdateRule]], str]
) -> None:
    fields = {"splitting": splitting, "norm_eps": 0.0, "num_layers": 4}
    ids = torch.randint(11, (3, 7))
    triple = tiny_model("triple_momentum", **fields)
    nesterov = tiny_model(registered("free_nesterov", FreeNesterov), **fields)
    with torch.no_grad():
        for substep in (s for block in triple.blocks for s in block.rules.values()):
            substep.mu_raw.add_(2)  # μ near 0.9 …
            substep.nu_raw.sub_(2)  # … and ν well below 1, so that μ' passes 1
    nesterov.load_state_dict(triple.state_dict(), strict=False)
    previous = torch.ones(1, dtype=torch.float64)
    past_one = 0
    with torch.no_grad():
        for ours, theirs in zip(triple.blocks, nesterov.blocks, strict=True):
            for substep, free in zip(ours.rules.values(), theirs.rules.values(), strict=True):
                free.norm.weight.mul_(substep.nu)
                free.mu_raw.copy_(substep.mu / previous)
                free.rho_raw.copy_(substep.beta / substep.gamma / previous)
                previous = substep.nu
                past_one += int(free.mu_raw > 1)
    assert past_one > 0
    assert (nesterov(ids) - triple(ids)).abs().max() < 1e-10
