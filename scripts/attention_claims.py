#!/usr/bin/env python
"""The pre-registered pairs of the attention study (docs/experiments.md), from a comparison.

    python scripts/attention_claims.py OUT/results.json

prints, in Markdown, the losses of all entries and the named differences with intervals that hold
for these pairs together (`polyak.statistics.factorial`). Pairs that lack an entry are named.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from polyak import formats
from polyak.statistics.factorial import intervals
from polyak.words import fixed

LINEAR = "gradient_descent[attention=linear]"
MOMENTUM = "gradient_descent[attention=momentum]"
ADAPTIVE = "gradient_descent[attention=adaptive_momentum]"
RELEASED = "gradient_descent[attention=momentum,attention.form=released]"


def of_rules(kind: str) -> list[tuple[str, str]]:
    """Each rule against gradient_descent, under one kind of attention."""
    inside = "" if kind == "softmax" else f"[attention={kind}]"
    rules = [
        f"{name}@attention+gradient_descent{inside}@mlp"
        for name in ("residual_momentum", "adaptive_residual_momentum")
    ]
    plain = f"gradient_descent{inside}"
    return [(rule, plain) for rule in (*rules, f"triple_momentum{inside}")]


PAIRS = [
    (MOMENTUM, LINEAR),
    (ADAPTIVE, LINEAR),
    (RELEASED, LINEAR),
    (ADAPTIVE, MOMENTUM),
    *of_rules("linear"),
    *of_rules("softmax"),
]


def losses_of(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Last losses by entry and seed."""
    return {
        entry["name"]: entry["loss"]["per_seed"] for entry in results["entries"] if entry["loss"]
    }


def main(path: Path) -> None:
    """Print the tables."""
    results = formats.read_results(path, "comparison")
    found = losses_of(results)
    rates = {entry["name"]: entry["sweep"] for entry in results["entries"]}
    print("| entry | nats/byte, by seed | mean | rate |\n| --- | --- | --- | --- |")
    for name, losses in found.items():
        swept = rates[name]
        rate = f"{swept['chosen']:g}{' (edge)' if swept['at_edge'] else ''}" if swept else ""
        each = ", ".join(f"{loss:.3f}" for loss in losses.values())
        print(f"| {name} | {each} | {np.mean(list(losses.values())):.4f} | {rate} |")
    pairs = [(one, other) for one, other in PAIRS if one in found and other in found]
    for one, other in PAIRS:
        if (one, other) not in pairs:
            print(f"\nmissing: {one} against {other}")
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    if not names:
        return
    seeds = sorted(set.intersection(*(set(found[name]) for name in names)))
    table = [[found[name][seed] for seed in seeds] for name in names]
    vectors = [[(name == one) - (name == other) for name in names] for one, other in pairs]
    print(f"\n{len(seeds)} seeds, {len(pairs)} pairs together\n")
    print("| entry | against | difference | 95% interval |\n| --- | --- | --- | --- |")
    reach = intervals(table, vectors)
    for (one, other), mean, half in zip(pairs, reach.mean, reach.half_width, strict=True):
        shown = "" if np.isnan(half) else f"{fixed(mean - half, 3)} to {fixed(mean + half, 3)}"
        print(f"| {one} | {other} | {fixed(mean, 3)} | {shown} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
