"""Made-up results with the shape, sizes and seed noise of real comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np

FAMILY = {
    # name: (final loss, parameters, FLOPs/token, tokens/s, MiB)
    "gradient_descent": (1.4963, 856_960, 5_308_416, 6_420, 412),
    "gradient_descent[tie_embeddings=false]": (1.4948, 889_728, 5_308_416, 6_402, 414),
    "gradient_descent[wrap_oracle=layer_norm]": (1.4989, 857_992, 5_308_416, 6_210, 431),
    "heavy_ball": (1.4780, 907_020, 5_308_416, 6_105, 455),
    "nesterov": (1.4712, 907_028, 5_308_416, 6_011, 471),
    "triple_momentum": (1.4693, 907_036, 5_308_416, 5_963, 474),
    "triple_momentum[stream_start=zeros]": (1.4741, 857_884, 5_308_416, 5_970, 470),
    "adam": (1.4761, 907_028, 5_308_416, 5_640, 518),
}
SCALARS = {
    "heavy_ball": ("beta", "gamma"),
    "nesterov": ("mu", "beta", "gamma"),
    "triple_momentum": ("mu", "beta", "gamma", "nu"),
    "triple_momentum[stream_start=zeros]": ("mu", "beta", "gamma", "nu"),
    "adam": ("beta1", "beta2", "gamma"),
}
STEPS, EVERY, BATCH_TOKENS, LAYERS = 800, 20, 2048, 4


def made_up(
    names: list[str] | None = None,
    seeds: int = 3,
    *,
    sd: float = 0.005,
    seed: int = 1,
    sweep: bool = False,
    status: str = "complete",
) -> dict[str, Any]:
    """Results as the runner hands them to `complete`: every run finished."""
    rng = np.random.default_rng(seed)
    names = list(FAMILY) if names is None else names
    shared = rng.normal(0, sd / 2, seeds)
    step = np.arange(0, STEPS + 1, EVERY)
    entries, runs = [], []
    for name in names:
        loss, parameters, flops, speed, peak = FAMILY.get(name, (1.48, 9e5, 5.3e6, 6e3, 450))
        rule = name.split("[")[0]
        momentum = rule not in ("gradient_descent",)
        scalars = {
            symbol: {
                substep: [float(0.5 + 0.1 * layer + rng.normal(0, 0.05)) for layer in range(LAYERS)]
                for substep in ("attention", "mlp")
            }
            for symbol in SCALARS.get(name, ())
        }
        entries.append(
            {
                "name": name,
                "rule": rule,
                "equation": f"x <- x + step of {rule}",
                "steps": STEPS,
                "parameters": int(parameters),
                "parameter_groups": {"embedding": 49_152, "blocks": int(parameters) - 49_152},
                "flops_per_token": int(flops),
                "tokens_per_second": {"median": speed, "low": 0.97 * speed, "high": 1.02 * speed},
                "peak_memory_bytes": int(peak * 2**20),
                "loss": None,
                "bits_per_byte": None,
                "difference": None,
                "sweep": _sweep(loss, rng) if sweep else None,
                "scalars": scalars or None,
            }
        )
        for index in range(seeds):
            final = loss + shared[index] + rng.normal(0, sd)
            # momentum starts behind and crosses later
            late = 0.35 * np.exp(-step / 90.0) * momentum
            wiggle = rng.normal(0, 0.002, len(step)) * (step < STEPS)
            curve = final + 3.9 * np.exp(-step / 60.0) + 0.55 * (1 - step / STEPS) ** 2
            curve = curve + late - late[-1] - 3.9 * np.exp(-STEPS / 60.0) + wiggle
            seconds = step * BATCH_TOKENS / speed * rng.uniform(0.97, 1.03)
            runs.append(
                {
                    "entry": name,
                    "seed": index,
                    "status": "finished",
                    "error": None,
                    "folder": f"runs/{name}/seed-{index}",
                    "seconds": float(seconds[-1]),
                    "curve": {
                        "step": step.tolist(),
                        "tokens": (step * BATCH_TOKENS).tolist(),
                        "flops": (step * BATCH_TOKENS * float(flops)).tolist(),
                        "seconds": seconds.tolist(),
                        "loss": curve.tolist(),
                    },
                }
            )
    return {
        "format": 1,
        "kind": "comparison",
        "status": status,
        "created": "2026-01-15T09:30:00+00:00",
        "command": "polyak compare --rules "
        + ",".join(names)
        + f" --seeds {seeds} --steps {STEPS} --corpus stdlib --out runs/family",
        "versions": {"polyak": "0.1.0", "torch": "2.13.0", "python": "3.12.3", "numpy": "2.4.6"},
        "machine": {
            "cpu": "Example CPU @ 2.60GHz",
            "cores": 2,
            "memory_bytes": 8 * 2**30,
            "system": "Linux 6.8 x86_64",
            "device": "cpu",
        },
        "commit": "0123456789ab",
        "corpus": {
            "name": "stdlib",
            "fingerprint": "9f2c4b7e" * 8,
            "tokenizer": "bytes",
            "tokenizer_fingerprint": "51d0a3c8" * 8,
            "vocab_size": 257,
            "train_tokens": 11_834_221,
            "validation_tokens": 262_144,
            "validation_bytes": 261_900,
        },
        "settings": {
            "model": {"num_layers": LAYERS, "num_heads": 4, "d_model": 128, "context_length": 128},
            "training": {
                "batch_size": 16,
                "steps": STEPS,
                "muon_lr": 0.02,
                "adamw_lr": 6e-4,
                "betas": [0.9, 0.95],
                "seed": None,
            },
            "match": "tokens",
            "seeds": list(range(seeds)),
            "jobs": 2,
            "quick": len(names) == 2,
        },
        "baseline": names[0],
        "entries": entries,
        "runs": runs,
        "limits": [
            "These are models of 0.86 million parameters after 1.6 million tokens; effects can "
            "shrink, grow or change sign with size and length.",
            "The intervals cover chance in the initial weights and the data order, not the choice "
            "of corpus, model size or training length.",
        ],
        "notes": [],
    }


def fail(results: dict[str, Any], entry: str, seed: int, at: int = 8) -> dict[str, Any]:
    """Make one run fail after `at` validations."""
    for run in results["runs"]:
        if run["entry"] == entry and run["seed"] == seed:
            run["status"] = "failed"
            run["error"] = f"loss became NaN at step {at * EVERY} (rule {entry})"
            run["seconds"] = None
            run["curve"] = {key: values[:at] for key, values in run["curve"].items()}
    return results


def grid(results: dict[str, Any]) -> dict[str, Any]:
    """The same with a sweep of two fields."""
    for entry in results["entries"]:
        loss = entry["sweep"]["losses"]
        entry["sweep"] |= {
            "field": "training.muon_lr, training.adam_lr",
            "values": [[a, b] for a in (0.01, 0.02) for b in (0.001, 0.003)],
            "losses": [loss[0], loss[1], None, loss[2]],
            "chosen": [0.01, 0.003],
            "at_edge": True,
        }
    return results


def _sweep(loss: float, rng: np.random.Generator) -> dict[str, Any]:
    values = [0.01, 0.02, 0.04]
    losses = [loss + 0.02, loss + 0.001 * float(rng.normal()), loss + 0.05]
    return {
        "field": "training.muon_lr",
        "values": values,
        "losses": losses,
        "chosen": 0.02,
        "seeds": [1000],
        "at_edge": False,
    }
