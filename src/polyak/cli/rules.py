"""`polyak rules`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from polyak.cli._options import parse
from polyak.output import say, show

if TYPE_CHECKING:
    from polyak.nn.config import ModelConfig
    from polyak.nn.placement import Placement

DESCRIPTION = """Print the family of update rules: equation, learned scalars, streams, and
parameters and training FLOPs relative to gradient_descent at the size given.

examples:
  polyak rules
  polyak rules --d-model 768 --num-layers 12 --num-heads 12 --vocab-size 50304
  polyak rules --rules triple_momentum,my_rule.py:MyRule
  polyak rules --rules residual_momentum@attention+gradient_descent@mlp
  polyak rules --check my_rule.py:MyRule[beta=0.8]
  polyak rules --format json"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RulesConfig:
    """What to print, and at which size to count."""

    rules: str | None = None
    """Rules separated by commas; default: all registered ones."""
    check: str | None = None
    """Only try whether this rule keeps what every rule must, as training does before its first
    step: no later token, no other row, no random number without torch's seed."""
    num_layers: int = 4
    """Layers."""
    num_heads: int = 4
    """Attention heads."""
    d_model: int = 128
    """Width."""
    vocab_size: int = 256
    """Number of token ids."""
    context_length: int = 128
    """Tokens in a sequence."""
    format: Literal["text", "json", "markdown"] = "text"
    """`json` for other programs, `markdown` for a table in a document."""


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(RulesConfig, "rules", words, DESCRIPTION)
    if config.check is not None:
        _check(config, config.check)
        return 0
    found = family(config)
    if config.format == "json":
        show(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    if config.format == "markdown":
        show(markdown(found))
        return 0
    from rich.padding import Padding
    from rich.text import Text

    from polyak.cli._console import Console

    console = Console(highlight=False)
    console.print(
        f"At {config.num_layers} layers, {config.num_heads} heads, d={config.d_model}, "
        f"T={config.context_length}, vocabulary {config.vocab_size:,}. Parameters, training FLOPs "
        "per token and state per token are relative to gradient_descent; g = O(x), γ, ν and s are "
        "above 0, φ is in (0, π/2), other scalars in (0, 1), with their initial values."
    )
    for rule in found:
        console.print()
        if "broken" in rule:
            title = Text(rule["name"], style="bold") + Text(f": broken: {rule['broken']}")
            console.print(title, soft_wrap=True)
            continue
        title = Text(rule["name"], style="bold")
        about = ", ".join(part for part in (rule["architecture"], rule["paper"]) if part)
        console.print(title + Text(f"  {about}" if about else "", style="dim"))
        scalars = ", ".join(
            f"{name} {value:.4g}"
            + (f" for each of {of}" if (of := rule["vectors"].get(name)) else "")
            + (" (fixed)" if name in rule["fixed"] else "")
            for name, value in rule["scalars"].items()
        )
        streams = ", ".join(f"{name} from {start}" for name, start in rule["streams"].items())
        lines = (
            rule["equation"],
            f"scalars: {scalars or 'none'}; streams: {streams or 'none'}",
            f"parameters ×{rule['relative_parameters']:.3f} ({rule['parameters']:,}), "
            f"FLOPs ×{rule['relative_flops']:.3f}, state ×{rule['relative_state']:.0f}",
        )
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    return 0


def _check(config: RulesConfig, rule: str) -> None:
    """Probe one rule and say that it passed; what fails is an error."""
    from polyak.compare.entries import parse_entry
    from polyak.nn.probe import LENGTHS, probe

    entry = parse_entry(rule, _model(config))
    probe(entry.model)
    lengths = sorted({min(n, config.context_length) for n in (*LENGTHS, config.context_length)})
    say(
        f"{entry.name}: no leak at {', '.join(map(str, lengths))} tokens, in training and in "
        "evaluation mode"
    )


def _model(config: RulesConfig) -> ModelConfig:
    from polyak.nn.config import ModelConfig

    return ModelConfig(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        d_model=config.d_model,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The family as a Markdown table."""
    rows = [
        "| rule | architecture | one substep | learned scalars | streams | parameters | FLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rule in found:
        if "broken" in rule:
            rows.append(f"| `{rule['name']}` | broken: {rule['broken']} | | | | | |")
            continue
        streams = ", ".join(f"{name}: {start}" for name, start in rule["streams"].items())
        cells = (
            f"`{rule['name']}`",
            rule["architecture"],
            rule["equation"],
            ", ".join(n for n in rule["scalars"] if n not in rule["fixed"]) or "–",
            streams or "–",
            f"×{rule['relative_parameters']:.3f}",
            f"×{rule['relative_flops']:.2f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def family(config: RulesConfig) -> list[dict[str, Any]]:
    """Every rule's facts, in the order of `polyak.rules.names()`.

    A rule of an installed package that does not work has its reason under `broken` instead, unless
    it was asked for by name.
    """
    from polyak import rules
    from polyak.compare.entries import parse_entry
    from polyak.errors import PolyakError
    from polyak.nn.cost import cost
    from polyak.nn.placement import placement_of
    from polyak.nn.rule_text import split_entries

    base = _model(config)
    first = cost(base)
    names = rules.names() if config.rules is None else split_entries(config.rules)
    found: list[dict[str, Any]] = []
    for name in names:
        try:
            model = parse_entry(name, base).model
            placement, price = placement_of(model), cost(model)
        except PolyakError as error:
            if config.rules is not None:
                raise
            found.append({"name": name, "broken": " ".join(str(error).split())})
            continue
        found.append(
            {
                "name": placement.name,
                **_papers(placement),
                "equation": placement.title,
                **_scalars(placement),
                "streams": {stream.name: stream.start for stream in placement.streams},
                "parameters": price.total_parameters,
                "training_flops_per_token": price.training_flops_per_token,
                "state_bytes_per_token": price.state_bytes_per_token,
                "relative_parameters": price.total_parameters / first.total_parameters,
                "relative_flops": price.training_flops_per_token / first.training_flops_per_token,
                "relative_state": price.state_bytes_per_token / first.state_bytes_per_token,
            }
        )
    return found


def _papers(placement: Placement) -> dict[str, str]:
    """Architecture and paper; of several rules, each that there is."""
    every = [placed.rule for placed in placement.parts]
    return {
        "architecture": every[0].architecture if len(every) == 1 else "",
        "paper": ", ".join(dict.fromkeys(rule.paper for rule in every if rule.paper)),
    }


def _scalars(placement: Placement) -> dict[str, Any]:
    """Scalars by name with their initial values, vectors with their shape, and what is fixed.

    Of several rules, a name has its place behind it: `mu@attention`.
    """
    scalars: dict[str, float] = {}
    vectors: dict[str, Any] = {}
    fixed: list[str] = []
    for placed in placement.parts:
        options = placed.rule.resolve(placed.options)
        where = "" if len(placement.parts) == 1 else f"@{placed.part.place or 'else'}"
        for name, scalar in placed.rule.present_scalars(options).items():
            scalars[name + where] = options[name]
            if scalar.is_vector:
                vectors[name + where] = scalar.shape
            if name in options["frozen"]:
                fixed.append(name + where)
    return {"scalars": scalars, "vectors": vectors, "fixed": fixed}
