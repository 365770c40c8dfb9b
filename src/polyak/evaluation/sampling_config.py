"""`SamplingConfig`: how text is drawn from a model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from polyak.checks import check_number, check_whole
from polyak.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the next token is drawn, and when a text ends.

    Raises:
        ConfigError: a field cannot work; the message names it, its value and the fix.
    """

    max_new_tokens: int = 200
    """Most tokens to add to a prompt."""
    temperature: float = 0.8
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the K likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens whose probabilities reach P, after top-k."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred before become less likely."""
    seed: int = 0
    """Of the draws; a text depends on its prompt and seed, not on those beside it."""
    stop: tuple[str, ...] = ()
    """End a text before this string; can be given several times."""
    ignore_end_of_text: bool = False
    """Go on past the end-of-text token."""

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens)
        check_whole("seed", self.seed, 0)
        if self.seed >= 2**62:
            raise ConfigError(f"seed={self.seed} must be below 2^62")
        check_whole("top_k", self.top_k, optional=True)
        check_number("temperature", self.temperature)
        check_number("repetition_penalty", self.repetition_penalty, above=True)
        if self.top_p is not None:
            check_number("top_p", self.top_p, 0, 1, above=True)
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise ConfigError(f"stop={self.stop!r} must be a tuple of strings")
        if "" in self.stop:
            raise ConfigError("stop='' would end every text before it begins; leave it out")
        object.__setattr__(self, "stop", tuple(self.stop))
