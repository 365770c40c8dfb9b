r"""From gradient descent to another rule, so that training can go on with momentum.

A rule that declares where it is gradient descent (`UpdateRule.descent`) starts exactly there: for
triple_momentum, v ← βv + γO(x + μv); x ← x + νv, without LN_v and with β = μ = 0, γ = ν = 1 it is
x ← x + O(x) whatever v is, to the last bit. Its coefficients are unconstrained, with slope 1 at 0:
∂L/∂β = ⟨∂L/∂v′, v⟩, which is not zero wherever a velocity has come in.

Everything else is an approximation. With LN_v or LN_u the update of a token has a fixed length,
which gradient descent's has not. The norm's gain w is then fitted on real text, substep by
substep: with x the new model's stream and x* where the old model is after the same substep,

    w_i = Σ (x* − x₀)_i u_i / Σ u_i²,    x′ = x₀ + w ⊙ u,

the least squares over all tokens, x₀ being the step at w = 0 and u its change at w = 1. Aiming at
x* instead of at the update corrects what earlier substeps missed. Without a norm γ is fitted alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak import rules
from polyak.errors import ConfigError, RuleError
from polyak.nn.config import ModelConfig
from polyak.nn.rule_places import Part, brackets_of, is_composite, parts_of, text_of
from polyak.nn.rule_text import RuleText
from polyak.nn.transformer import Transformer
from polyak.rules import UpdateRule


@dataclass(frozen=True)
class Upgrade:
    """An upgraded model.

    Attributes:
        model: in evaluation mode.
        exact: whether it computes what the old one did.
        misses: per substep of every layer, ‖x′ − x*‖ / ‖x* − x*_before‖ of the fit; empty if exact.
    """

    model: Transformer
    exact: bool
    misses: tuple[float, ...] = ()


def upgraded_config(config: ModelConfig, wanted: RuleText) -> tuple[ModelConfig, bool]:
    """The configuration of the upgraded model, and whether it starts as the same function.

    Args:
        config: of a gradient_descent model.
        wanted: the rule with its options; the rule's point of descent fills in the rest.

    Raises:
        ConfigError: the model is not gradient descent's, its attention is not softmax, or the
            brackets change its architecture.
    """
    if (
        config.rule != "gradient_descent"
        or config.rule_options.get("update_norm", "none") != "none"
    ):
        raise ConfigError(
            f"only models of rule gradient_descent can be upgraded; this one is {config.rule} with "
            f"options {config.rule_options}"
        )
    if config.attention != "softmax":
        raise ConfigError(
            f"only models with softmax attention can be upgraded; this one has attention="
            f"{config.attention}: train it with the other rule from the start"
        )
    other = [name for name in wanted.of_the_model if name != "stream_start"]
    if other:
        raise ConfigError(
            f"--rule: {other[0]} belongs to the model, whose weights stay; only stream_start and "
            f"the options of {wanted.rule} can be set"
        )
    text, options, exact = wanted.rule, dict(wanted.options), True
    if is_composite(text):
        written = []
        for part in parts_of(text):
            own, one = _descending(part.rule, part.options)
            written.append(Part(part.rule, brackets_of(own), part.place))
            exact = exact and one
        text = text_of(written)
    else:
        options, exact = _descending(text, options)
    start = wanted.fields.get("stream_start", "none")
    zeros: Any = None if start.lower() in ("none", "null") else start
    made = dataclasses.replace(
        config,
        rule=text,
        rule_options=options,
        stream_start=zeros,
    )
    return made, exact


def _descending(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """A rule's options with its point of descent where the user's leave room; is it reached?"""
    rule, options = rules.get(name), dict(given)
    if rule.descent is not None:
        options.setdefault("coefficients", "unconstrained")
        free = options["coefficients"] == "unconstrained"
        for option, value in rule.descent.items():
            reachable = free or option not in rule.scalars or rule.scalars[option].raw_of(value)
            if option not in options and reachable is not None:
                options[option] = value
    resolved = rule.resolve(options)
    if rule.descent is None:  # nothing but gradient descent itself is
        return options, rule.name == "gradient_descent" and resolved["update_norm"] == "none"
    if resolved["coefficients"] != "unconstrained":
        return options, False
    there = rule.resolve({**options, **rule.descent})
    return options, all(resolved[n] == there[n] for n in rule.descent if n != "frozen")


def upgrade(
    source: Transformer, wanted: RuleText, text: Callable[[], Tensor], seed: int = 0
) -> Upgrade:
    """The model under another rule, exact where the rule allows it, else fitted.

    Args:
        source: a gradient_descent model, in evaluation mode.
        wanted: the rule with its options.
        text: gives token ids (B, T) to fit on; not called where nothing is to be fitted.
        seed: of the tables of auxiliary streams, where the rule has some.

    Raises:
        ConfigError: see `upgraded_config`.
        RuleError: the rule has neither a norm nor a γ that could be fitted.
    """
    config, exact = upgraded_config(source.config, wanted)
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    new = {name for name, _ in model.named_parameters()}
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    drawn = {n for n in missing if n.startswith(("streams.", "starts.")) or ".rules." in n}
    assert not unexpected, unexpected
    assert set(missing) & new == drawn, missing
    return Upgrade(model, True) if exact else Upgrade(model, False, fit(source, model, text()))


@torch.no_grad()
def fit(source: Transformer, model: Transformer, ids: Tensor) -> tuple[float, ...]:
    """Fit the gains of `model`, in place, so that its x follows that of `source` on `ids` (B, T).

    Returns:
        The miss of every substep, see `Upgrade.misses`.
    """
    x_old, state_old = source.start(ids)
    x, state = model.start(ids)
    misses: list[float] = []
    for old, new in zip(source.blocks, model.blocks, strict=True):
        aims: list[tuple[Tensor, Tensor]] = []

        def note(
            rule: UpdateRule, step: Step, x: Tensor, aims: list[tuple[Tensor, Tensor]] = aims
        ) -> None:
            aims.append((step()[0], x))

        def follow(
            rule: UpdateRule, step: Step, x: Tensor, aims: list[tuple[Tensor, Tensor]] = aims
        ) -> None:
            aim, before = aims.pop(0)
            _fit_gain(rule, lambda: step()[0], aim)
            misses.append(float((step()[0] - aim).norm() / (aim - before).norm()))

        with _seeing(old, note):
            x_old, state_old = old(x_old, state_old)
        with _seeing(new, follow):
            x, state = new(x, state)
    return tuple(misses)


Step = Callable[[], tuple[Tensor, Any]]


@contextmanager
def _seeing(block: Any, see: Callable[[UpdateRule, Step, Tensor], None]) -> Iterator[None]:
    """Call `see(rule, step, x)` before each step of a block; `step()` takes it at will."""
    own = list(block.rules.values())
    for rule in own:

        def step(x: Tensor, state: Any, oracle: Any, rule: Any = rule) -> tuple[Tensor, Any]:
            def once() -> tuple[Tensor, Any]:
                moved: tuple[Tensor, Any] = type(rule).step(rule, x, state, oracle)
                return moved

            see(rule, once, x)
            return once()

        rule.step = step
    try:
        yield
    finally:
        for rule in own:
            del rule.step


def _fit_gain(rule: UpdateRule, moved: Callable[[], Tensor], aim: Tensor) -> None:
    """Set the gain (and bias) of the rule's norm, or its γ, so that moved() is nearest to `aim`."""
    if rule.name == "gradient_descent" and rule.options["update_norm"] == "none":
        return  # beside other rules: it has nothing to fit
    norms = [getattr(rule, name) for name in rule.norms]
    norms = [norm for norm in norms if hasattr(norm, "weight")]
    if norms:
        norm = norms[0]
        bias = getattr(norm, "bias", None)  # an RMSNorm has none
        norm.weight.zero_()
        if bias is not None:
            bias.zero_()
        still = moved()
        norm.weight.fill_(1)
        u, rest = (moved() - still).flatten(0, -2), (aim - still).flatten(0, -2)
        if bias is None:
            norm.weight.copy_((rest * u).sum(0) / _positive((u * u).sum(0)))
            return
        norm.weight.zero_()
        bias.fill_(1)
        unit = (moved() - still).flatten(0, -2).mean(0)  # x′ is linear in the bias too
        u_mean, rest_mean = u.mean(0), rest.mean(0)
        centred = u - u_mean
        norm.weight.copy_((rest * centred).sum(0) / _positive((centred * centred).sum(0)))
        bias.copy_((rest_mean - norm.weight * u_mean) / unit)
        return
    scalar = rule.present_scalars(rule.options).get(rule.gain)
    if scalar is None:
        raise RuleError(f"rule {rule.name} has neither a norm nor a {rule.gain} to be fitted")
    raw: Any = getattr(rule, f"{rule.gain}_raw")
    ends = []
    for value in (1.0, 2.0):
        raw.fill_(scalar.raw_of(value))
        ends.append(moved())
    u = ends[1] - ends[0]
    gamma = float(((aim - ends[0] + u) * u).sum() / _positive((u * u).sum()))
    fitted = scalar.raw_of(gamma)
    if fitted is None:
        raise RuleError(
            f"rule {rule.name}: the fitted {rule.gain} is {gamma:.4g}, outside {scalar.domain}; "
            "add coefficients=unconstrained to --rule"
        )
    raw.fill_(fitted)


def _positive(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(total.dtype).tiny)
