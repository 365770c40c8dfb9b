"""Text from a trained model: prompts in, pieces of text out as they become certain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyak.data.tokenizers import Tokenizer
from polyak.errors import ConfigError
from polyak.evaluation.decoder import Decoder
from polyak.evaluation.sampling import Sampler
from polyak.evaluation.sampling_config import SamplingConfig
from polyak.evaluation.text_stream import TextStream
from polyak.nn.transformer import Transformer

End = Literal["end of text", "stop string", "length"]


@dataclass(frozen=True)
class Piece:
    """What one new token added to a row.

    Attributes:
        row: which prompt.
        token: the token's id.
        text: the text that has become certain; may be empty.
        end: why the row ends here; None if it goes on.
    """

    row: int
    token: int
    text: str
    end: End | None


@dataclass(frozen=True)
class Completion:
    """What a prompt became.

    Attributes:
        text: the new text, without the stop string or end-of-text token that ended it.
        tokens: every new token, those too.
        end: why it ends.
    """

    text: str
    tokens: tuple[int, ...]
    end: End


class Generation:
    """Rows of tokens that are continued together; iterating gives (row, token), step by step.

    A row ends after `max_new_tokens`, at the end-of-text token, or when `end` is called.

    Args:
        model: in evaluation mode.
        prompts: token ids, at least one each; lengths may differ.
        config: how tokens are drawn; stop strings are the business of `generate`.
        seeds: one per row; default: the configuration's for every row.
        end_of_text: the token that ends a row; None: none does.
        vocabulary: draw among ids below this only, for a model with more ids than its tokenizer.

    Raises:
        ConfigError: a prompt is empty or has a token the model does not know.
        DivergedError: (while iterating) the model's logits are not finite.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
        end_of_text: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.config = config or SamplingConfig()
        self._end_of_text = None if self.config.ignore_end_of_text else end_of_text
        self._vocabulary = vocabulary or model.config.vocab_size
        self._decoder = Decoder(model, prompts)
        self._sampler = Sampler(
            self.config,
            self._decoder.rows,
            [self.config.seed] * len(prompts) if seeds is None else seeds,
            self._vocabulary,
            self._decoder.device,
        )
        self._running = list(range(len(prompts)))
        self._ended: set[int] = set()

    def end(self, row: int) -> None:
        """Let a row get no further token."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        tokens: Tensor | None = None
        for _ in range(self.config.max_new_tokens):
            if not self._running:
                return
            # entered for each step: what runs between two of them is not ours
            with torch.inference_mode():
                logits = self._decoder.logits(tokens)
                tokens = self._sampler(logits[:, : self._vocabulary])
            for row, token in zip(self._running, tokens.tolist(), strict=True):
                if token == self._end_of_text:
                    self.end(row)
                yield row, token
            if self._ended:
                tokens = self._drop(tokens)

    def _drop(self, tokens: Tensor) -> Tensor:
        kept = [place for place, row in enumerate(self._running) if row not in self._ended]
        self._running = [self._running[place] for place in kept]
        self._ended.clear()
        if not kept:
            return tokens
        with torch.inference_mode():
            self._decoder.keep(kept)
            self._sampler.keep(kept)
            return tokens[torch.tensor(kept, device=tokens.device)]


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    quiet: bool = False,
) -> Iterator[Piece]:
    """Continue texts, all at once; pieces come as soon as their text is certain.

    What a row becomes depends on its prompt and seed, and on the rows beside it only through the
    rounding of sums. A tokenizer's `prefix` stands before every prompt. An empty prompt begins a
    document: without a prefix, the model is given the end-of-text token.
    Of a prompt longer than the context the last tokens are read; what happens where a text grows
    beyond the context says `Decoder`. Models without an end (`Transformer.longest`) know neither.
    Warnings say which of these happen (see `notes`).

    Args:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        prompts: texts.
        config: how tokens are drawn, and when a text ends.
        seeds: one per row; default: the configuration's for every row.
        quiet: give no warnings.

    Raises:
        ConfigError: the tokenizer has more ids than the model.
        DataError: a prompt is not valid Unicode.
        DivergedError: the model's logits are not finite.
    """
    config = config or SamplingConfig()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    for note in () if quiet else notes(model, tokenizer, prompts, config):
        warnings.warn(note, stacklevel=2)
    rows = _rows(tokenizer, prompts)
    generation = Generation(
        model,
        rows,
        config,
        seeds=seeds,
        end_of_text=tokenizer.end_of_text,
        vocabulary=tokenizer.vocab_size,
    )
    return _pieces(generation, tokenizer, len(rows))


def _pieces(generation: Generation, tokenizer: Tokenizer, rows: int) -> Iterator[Piece]:
    config, table = generation.config, tokenizer.byte_strings
    streams = [TextStream(config.stop) for _ in range(rows)]
    counts = [0] * rows
    for row, token in generation:
        stream = streams[row]
        counts[row] += 1
        if token == tokenizer.end_of_text and not config.ignore_end_of_text:
            yield Piece(row, token, stream.end(), "end of text")
            continue
        text = stream.push(table[token])
        if stream.stopped:
            generation.end(row)
            yield Piece(row, token, text, "stop string")
        elif counts[row] == config.max_new_tokens:
            yield Piece(row, token, text + stream.end(), "length")
        else:
            yield Piece(row, token, text, None)


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    quiet: bool = False,
) -> list[Completion]:
    """`generate`, to the end: one completion per prompt."""
    texts: list[list[str]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    ends: dict[int, End] = {}
    for piece in generate(model, tokenizer, prompts, config, seeds=seeds, quiet=quiet):
        texts[piece.row].append(piece.text)
        tokens[piece.row].append(piece.token)
        if piece.end is not None:
            ends[piece.row] = piece.end
    return [
        Completion("".join(texts[row]), tuple(tokens[row]), ends[row])
        for row in range(len(prompts))
    ]


def _rows(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt's ids behind what the tokenizer's texts begin with."""
    rows = [[*tokenizer.prefix, *ids.tolist()] for ids in tokenizer.encode_many(prompts)]
    return [row or [tokenizer.end_of_text] for row in rows]


def notes(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], config: SamplingConfig
) -> list[str]:
    """One line on everything about prompts and lengths that a user may not expect."""
    found = []
    rows = _rows(tokenizer, prompts)
    context = model.config.context_length
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt]
    if empty:
        found.append(f"{_named(empty)} empty: a new document begins")
    if model.longest is None:
        return found
    long = [number for number, row in enumerate(rows, 1) if len(row) > context]
    if long:
        most = max(len(rows[number - 1]) for number in long)
        found.append(
            f"{_named(long)} longer than the context of {context} tokens (up to {most}): only the "
            f"last {context} are read"
        )
    longest = max((min(len(row), context) for row in rows), default=0)
    # the last token that is drawn is not read
    if longest + config.max_new_tokens - 1 > context:
        found.append(
            f"{longest} tokens and {config.max_new_tokens} new ones are more than the context of "
            f"{context}: where it is full, the text goes on from its last {max(1, context // 2)} "
            "tokens"
        )
    return found


def _named(numbers: Sequence[int]) -> str:
    """`prompt 3 is`, `prompts 1, 2 and 7 are`."""
    if len(numbers) == 1:
        return f"prompt {numbers[0]} is"
    shown = ", ".join(map(str, numbers[:4]))
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"prompts {shown}{more} are"
