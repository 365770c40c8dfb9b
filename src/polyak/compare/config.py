"""`CompareConfig`: what `polyak compare` compares, on what, and for how long. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyak.checks import check_whole
from polyak.errors import ConfigError
from polyak.training.config.run import Device

Match = Literal["tokens", "flops", "seconds", "params"]
MatchBy = Literal["width", "residual_width", "reinjection"]

QUICK_RULES = "gradient_descent,triple_momentum"
FULL_RULES = (
    "gradient_descent,gradient_descent[tie_embeddings=false],gradient_descent[update_norm=layer],"
    "heavy_ball,nesterov,triple_momentum,triple_momentum[stream_start=zeros],adam"
)
SWEEP_SEED = 1000
QUICK_STEPS, FULL_STEPS = 600, 1200


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """What is compared, on what, and for how long.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    rules: str | None = None
    """Entries separated by commas, options in brackets: `triple_momentum[stream_start=zeros]`,
    `path/to/my_rule.py:MyRule`. The first is the baseline. Default: eight of the family."""
    seeds: int = 3
    """Seeds per entry: 0, 1, … Intervals need at least 2."""
    steps: int | None = None
    """Optimizer steps of the baseline; the others follow from --match. Default: 1200, with
    --quick 600."""
    match: Match = "tokens"
    """What is equal for all: `tokens`, training `flops`, `seconds` (by speeds measured first), or
    `params` (equal tokens, the baseline enlarged to the largest entry's parameter count)."""
    match_by: MatchBy = "width"
    """How --match params enlarges the baseline: in `width`, in `residual_width` at fixed attention
    and MLP, or by `reinjection`: a second table, as a velocity's own, added before every layer."""
    corpus: str = "stdlib"
    """`stdlib`, `prose`, `tinystories` or another name (see `polyak prepare --help`), or a path to
    text files, a folder, JSONL or Parquet."""
    text_field: str = "text"
    """Field that holds the text in JSONL and Parquet."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON, such as `latin-1`."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe-N` (trained on the corpus, N tokens), `gpt2`, or a tokenizer's path."""
    out: Path = Path("runs/compare")
    """Folder for runs, results.json and report.html; started again, it goes on where it was."""
    quick: bool = False
    """Compare gradient_descent and triple_momentum only, in minutes."""
    sweep: tuple[str, ...] = ()
    """Give each entry its own best rate: `training.muon_lr=0.005,0.01,0.02`; of several fields,
    each with a --sweep of its own, their grid."""
    sweep_seeds: int = 1
    """Seeds per swept value: 1000, 1001, … never those of the comparison."""
    jobs: int | None = None
    """Runs side by side, one thread each; default: one per core (one in all on CUDA)."""
    device: Device = "auto"
    """`cpu`, `cuda` or `auto`."""
    set: tuple[str, ...] = ()
    """Any other setting for all entries: `model.num_layers=6`, `training.batch_size=32`."""

    def __post_init__(self) -> None:
        if isinstance(self.sweep, str):  # one field
            object.__setattr__(self, "sweep", (self.sweep,))
        for name in ("seeds", "sweep_seeds"):
            check_whole(name, getattr(self, name))
        for name in ("steps", "jobs"):
            check_whole(name, getattr(self, name), optional=True)
        if self.seeds >= SWEEP_SEED:
            raise ConfigError(f"seeds={self.seeds} must be below {SWEEP_SEED}")
        if self.match_by != "width" and self.match != "params":
            raise ConfigError(
                f"match_by={self.match_by!r} says how parameters are matched, and this comparison "
                f"has match={self.match!r}; use --match params, or leave it out"
            )
        if self.quick and self.rules is not None:
            raise ConfigError(
                "quick=True compares a fixed pair of rules; leave out either --quick or --rules"
            )
