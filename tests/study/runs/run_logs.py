"""Run folders with made-up logs, of the shape that training writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from polyak import ModelConfig
from polyak.files import write_json
from polyak.training.config.training import TrainingConfig
from polyak.training.runs.metrics import MetricsLog

LAYERS, TOKENS = 3, 512


def write_run(
    folder: Path,
    rule: str = "gradient_descent",
    *,
    seed: int = 0,
    steps: int = 200,
    until: int | None = None,
    level: float = 2.0,
    validation: str = "a" * 64,
    events: tuple[tuple[str, dict[str, Any]], ...] = (),
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    machine: str = "Example CPU",
    old: bool = False,
    every: int = 10,
) -> Path:
    """A run of `steps` steps that logged up to `until`; finished if that is the end.

    `old` leaves out what early versions did not log.
    """
    folder.mkdir(parents=True)
    until = steps if until is None else until
    config = ModelConfig(
        rule=rule, num_layers=LAYERS, num_heads=2, d_model=16, context_length=16, **(model or {})
    )
    recipe = TrainingConfig(steps=steps, seed=seed, **(training or {}))
    settings = {
        "model": config.to_dict(),
        "training": recipe.to_dict(),
        "corpus": {"name": "stdlib", "fingerprint": "c" * 64},
        "validation": {"fingerprint": validation, "tokens": 1024, "bytes": 2048},
        "device": "cpu",
    }
    environment = {"versions": {"torch": "2.13.0"}, "machine": {"cpu": machine, "cores": 2}}
    write_json(folder / "run.json", {"format": 1, "settings": settings, "environment": environment})
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(every, until + 1, every):
            for kind, fields in events:
                if step - every < fields["step"] <= step:
                    log.write(kind, **fields)
            loss = level + 3 * math.exp(-step / 40) + 0.05 * math.sin(step + seed)
            place = {"step": step, "tokens": step * TOKENS, "flops": step, "seconds": step / 50}
            scalars = {
                "beta": {
                    part: [0.5 + step / steps * 0.1 * layer for layer in range(LAYERS)]
                    for part in ("attention", "mlp")
                }
            }
            more = {} if old else {"flops_per_second": 3e9, "peak_fraction": 0.25}
            log.write(
                "train",
                **place,
                loss=loss,
                gradient_norm=1 + math.cos(step) ** 2,
                tokens_per_second=TOKENS * 50 + 100 * math.sin(step),
                rates={"matrices": 0.02 * (1 - step / steps), "norms": 0.003},
                scalars={} if rule == "gradient_descent" else scalars,
                **more,
                **({} if old else {"memory_bytes": 500 * 2**20}),
            )
            if step % (4 * every) == 0:
                kept = {} if rule == "gradient_descent" else scalars
                log.write("validation", **place, loss=loss + 0.1, scalars=kept)
    if until == steps:
        write_json(
            folder / "result.json",
            {
                "steps": steps,
                "loss": level,
                "seconds": steps / 50,
                "peak_memory_bytes": 512 * 2**20,
            },
        )
    return folder
