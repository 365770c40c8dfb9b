r"""Drawing the next token from logits (rows, V): repetition penalty, temperature, top-k, top-p.

In this order, which is that of Hugging Face's `generate`. A token is drawn by inverting the
cumulative distribution at one uniform number per row and step, which comes from the row's own
generator: what a row draws does not depend on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.errors import ConfigError, DivergedError
from polyak.evaluation.sampling_config import SamplingConfig

_CHUNK = 256  # uniform numbers drawn at once for a row


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty where positive, multiplied where negative.

    The rule of CTRL (arXiv:1909.05858) as Hugging Face has it.

    Shapes: logits (rows, V), seen (rows, V) bool.
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def candidates(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """The tokens that can be drawn, and their probabilities.

    p = softmax(logits / temperature), restricted to the top_k largest and scaled to sum 1, then
    to the fewest largest whose sum reaches top_p (at least one).

    Returns:
        Probabilities (rows, C) in float64, up to a factor per row, and their token ids (rows, C),
        largest first; ids None where every token is a candidate, in order of id.
    """
    ids: Tensor | None = None
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        logits, ids = logits.topk(config.top_k, dim=-1)
    elif config.top_p is not None and config.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    # the largest is subtracted first: a tiny temperature then gives −inf, not inf; in float64,
    # since one that float32 does not have would be 0 there
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / config.temperature
    probabilities = torch.softmax(scaled, dim=-1)
    if config.top_p is not None and config.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = before >= config.top_p
        outside[..., 0] = False
        probabilities = probabilities.masked_fill(outside, 0.0)
    return probabilities, ids


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The place where the cumulative sum first exceeds uniform × total: (rows,) int64.

    A place of probability 0 is never returned.

    Shapes: probabilities (rows, C), uniform (rows,) in [0, 1).
    """
    sums = probabilities.cumsum(dim=-1)
    return torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]


class Sampler:
    """Draws a token for every row, step after step.

    Args:
        config: how.
        prompts: each row's tokens so far, for the repetition penalty.
        seeds: one per row.
        vocabulary: V.
        device: where the logits are.
    """

    def __init__(
        self,
        config: SamplingConfig,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._uniform = torch.empty(len(seeds), 0, dtype=torch.float64)
        self._step = 0
        self._seen: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen = torch.zeros(len(seeds), vocabulary, dtype=torch.bool, device=device)
            for row, prompt in zip(self._seen, prompts, strict=True):
                row[torch.tensor(prompt, dtype=torch.long, device=device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of every row, (rows,) int64.

        Raises:
            DivergedError: a logit is NaN, or the largest is infinite.
            ConfigError: the repetition penalty makes it so.
        """
        highest, chosen = logits.max(dim=-1)
        if not all(map(math.isfinite, highest.tolist())):
            raise DivergedError("the model's logits are not finite; its weights are of no use")
        if self._seen is not None:
            penalty = self.config.repetition_penalty
            logits = penalise(logits, self._seen, penalty)
            highest, chosen = logits.max(dim=-1)
            if not all(map(math.isfinite, highest.tolist())):
                raise ConfigError(
                    f"repetition_penalty={penalty!r} takes logits out of the range of "
                    f"{str(logits.dtype).removeprefix('torch.')}; use one nearer to 1"
                )
        if self.config.temperature > 0:
            probabilities, ids = candidates(logits, self.config)
            places = draw(probabilities, self._next_uniform())
            chosen = places if ids is None else ids.gather(-1, places[:, None])[:, 0]
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        kept = torch.tensor(rows, dtype=torch.long)
        self._generators = [self._generators[row] for row in rows]
        self._uniform = self._uniform[kept]
        if self._seen is not None:
            self._seen = self._seen[kept.to(self.device)]

    def _next_uniform(self) -> Tensor:
        column = self._step % _CHUNK
        if column == 0:  # drawn on the CPU: the device changes nothing
            drawn = [
                torch.rand(_CHUNK, generator=generator, dtype=torch.float64)
                for generator in self._generators
            ]
            # below 1 by enough that its product with a sum is below that sum
            self._uniform = torch.stack(drawn).clamp_(max=1 - 2**-40)
        self._step += 1
        return self._uniform[:, column].to(self.device)
