"""`polyak upgrade`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyak.cli._options import parse
from polyak.output import say
from polyak.training.config.corpus import CorpusConfig

DESCRIPTION = """Turn a gradient_descent model into one of another rule, to go on training it
with momentum (polyak train --init). heavy_ball, nesterov and triple_momentum
start as exactly the same function; with a norm in the rule, and for every other
rule, gains are fitted on text and the loss before and after is reported.

examples:
  polyak upgrade runs/mine runs/upgraded
  polyak upgrade runs/gpt2 runs/upgraded \\
    --rule triple_momentum[stream_start=zeros]
  polyak upgrade runs/mine runs/upgraded \\
    --rule triple_momentum[state_norm=layer]
  polyak upgrade runs/gpt2 runs/upgraded --rule adam --corpus ~/texts"""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpgradeConfig(CorpusConfig):
    """Which model, into what."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder: trained here, or imported."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the upgraded run."""
    rule: str = "triple_momentum"
    """The new rule; brackets set its options and stream_start."""
    tokens: int = 8192
    """Training tokens to fit on, and validation tokens to measure on."""
    seed: int = 0
    """Seed of the tables that the rule's streams start from."""
    trust_code: bool = False
    """Run the code of a rule that comes with it; that of what was made here needs no word."""

    def __post_init__(self) -> None:
        self.check_corpus()


def main(words: Sequence[str]) -> int:
    """Run the command."""
    config = parse(UpgradeConfig, "upgrade", words, DESCRIPTION)
    from polyak.interop.made_runs import check_out
    from polyak.interop.upgrade_run import upgrade_run
    from polyak.nn.rule_text import parse_rule

    check_out(config.out)
    found = upgrade_run(
        config.run,
        config.out,
        parse_rule(config.rule, "--rule"),
        corpus=config.corpus,
        **config.reading,
        tokens=config.tokens,
        seed=config.seed,
    )
    if found["exact"]:
        say("Exact: at step 0 the model computes what it did.")
    else:
        say(
            f"Not exact: gains fitted on {found['fitted_on']['tokens']:,} tokens of "
            f"{found['fitted_on']['corpus']}; a substep misses its aim by "
            f"{found['mean_miss']:.1%} of its length on average."
        )
    if found["loss_before"] is not None:
        jump = found["loss_after"] - found["loss_before"]
        say(
            f"Validation loss {found['loss_before']:.4f} before, {found['loss_after']:.4f} after "
            f"({jump:+.4f}) on {found['measured_on']['tokens']:,} tokens of "
            f"{found['measured_on']['corpus']}."
        )
    else:
        say("The run does not say which corpus it was trained on; --corpus measures the loss.")
    say(f"Run: {config.out}; go on with: polyak train --init {config.out} --out FOLDER")
    return 0
