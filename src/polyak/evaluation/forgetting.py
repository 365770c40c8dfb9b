r"""Forgetting: how much of the source a model loses while it is trained on something else.

A finished model is trained for some steps on another corpus, the target. With L_s and L_t the
losses on fixed validation tokens of the source and of the target,

    forgetting = L_s(after) − L_s(before),      plasticity = L_t(before) − L_t(after).

Both are paired differences on the same tokens and have a standard error over blocks or documents
(`evaluation.losses`). The protocol is that of arXiv:2605.24425: AdamW, rate 1e-4, decay 0.01, betas
0.9 and 0.95, 50 steps of warm-up, a cosine to a tenth; 1,000 steps of 480 sequences there. The
gradient is clipped to a norm of 1, as in training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from polyak.data.prepare import Prepared
from polyak.errors import DivergedError, RunError
from polyak.evaluation.config import ForgettingConfig
from polyak.evaluation.losses import Losses, difference, require_causal, summary, token_losses
from polyak.evaluation.subjects import Subject, corpus_of
from polyak.files import sha256_of
from polyak.nn.transformer import Transformer
from polyak.training.config.run import RunConfig
from polyak.training.processes.distributed import World
from polyak.training.trainer import Trainer

Progress = Callable[[dict[str, Any]], None]


def experiment(subject: Subject, config: ForgettingConfig) -> dict[str, Any]:
    """What decides the result, for JSON: equal ones need not be measured twice.

    Raises:
        RunError: the run's weights are missing.
        DataError: the corpus is missing, or has another tokenizer.
    """
    weights = subject.folder / "model" / "model.safetensors"
    if not weights.is_file():
        raise RunError(f"{weights} is missing")
    return {
        "protocol": config.protocol(),
        "weights": sha256_of(weights),
        "onto": _onto(subject, config.onto, config).fingerprint,
        "source": subject.settings.get("corpus", {}).get("fingerprint"),
    }


def _onto(subject: Subject, onto: str, config: ForgettingConfig) -> Prepared:
    return corpus_of(subject, onto, text_field=config.text_field, encoding=config.encoding)


def forget(
    subject: Subject,
    onto: str,
    config: ForgettingConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a copy of a model on another corpus and measure what it loses and gains.

    The subject and its folder are left as they are. The batch of a step depends on `config.seed`
    and the step alone, so models with one context and tokenizer see the same.

    Args:
        subject: a finished run of polyak; the source is the corpus it was trained on.
        onto: the target, see `subjects.corpus_of`.
        config: the protocol; its own `onto` is not looked at.
        progress: called after every step with `step`, `steps`, `loss` and the `curve` so far.

    Returns:
        `curve` (`step`, `source`, `target`), `source` and `target` (`corpus`, `before`, `after`,
        each as in `losses.summary`), `forgetting` and `plasticity` (`value`, `se`), `seconds`;
        ready for JSON.

    Raises:
        RunError: the model is not one of polyak's or not causal, or its own corpus has changed.
        DataError: a corpus is missing, too short or empty, or has another tokenizer.
        DivergedError: the loss stopped being finite.
    """
    require_causal(subject)
    model = subject.model
    if not isinstance(model, Transformer):
        raise RunError(f"{subject.name} is no run of polyak, so it cannot be trained on")
    target = _onto(subject, onto, config)
    recipe = config.training()
    run = RunConfig(model=model.config, training=recipe, corpus=onto, device=config.device)
    began = time.perf_counter()
    with World.start(config.device) as world:
        trainer = Trainer(run, target, world, weights=model.state_dict())
        changing = dataclasses.replace(subject, model=trainer.model)

        def measure() -> tuple[Losses, Losses]:
            trainer.model.eval()
            both = tuple(
                token_losses(
                    changing,
                    corpus,
                    tokens=config.eval_tokens,
                    text_field=config.text_field,
                    encoding=config.encoding,
                )
                for corpus in (None, onto)
            )
            trainer.model.train()
            return both[0], both[1]

        before = now = measure()
        curve: dict[str, list[Any]] = {"step": [], "source": [], "target": []}
        _add(curve, 0, before)
        for step in range(recipe.steps):
            done = step + 1
            try:
                loss, _ = trainer.step(step)
                if done % recipe.eval_interval == 0 or done == recipe.steps:
                    now = measure()
                    _add(curve, done, now)
            except DivergedError as error:
                rates = f"lr={config.lr!r}"
                if config.optimizer == "muon":
                    rates += f" or muon_lr={config.muon_lr!r}"
                raise DivergedError(
                    f"{subject.name} diverged on {onto}: its loss is not finite at step {done}; "
                    f"lower {rates}"
                ) from error
            if progress is not None:
                progress({"step": done, "steps": recipe.steps, "loss": loss, "curve": curve})
    lost, gained = difference(now[0], before[0]), difference(before[1], now[1])
    return {
        "curve": curve,
        "source": {"before": summary(before[0]), "after": summary(now[0])},
        "target": {"before": summary(before[1]), "after": summary(now[1])},
        "forgetting": lost,
        "plasticity": gained,
        "tokens_per_step": trainer.tokens_per_step,
        "seconds": time.perf_counter() - began,
    }


def _add(curve: dict[str, list[Any]], step: int, losses: tuple[Losses, Losses]) -> None:
    for name, value in zip(
        ("step", "source", "target"),
        (step, *(float(found.nats.mean()) for found in losses)),
        strict=True,
    ):
        curve[name].append(value)
