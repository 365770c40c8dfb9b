r"""Losses of a trained model on any text: token by token, then as means with standard errors.

The scored tokens are always the targets of evenly spaced blocks (`ValidationBatches`). Plain: a
block of T tokens is one sequence, so its first token is predicted from a single one. Sliding: the
same targets, S at a time, each from a window of T inputs that ends where they end and reaches back
before the block; every token is scored once, from at least T − S + 1 inputs (fewer only within T
of the corpus's beginning). S = T is the plain form.

Standard errors. Tokens are not independent, so errors are of sums over clusters c (blocks, or
documents): for a ratio r = Σ_c a_c / Σ_c b_c (nats over tokens, or over bytes) with n clusters

    se(r)² = n/(n−1) · Σ_c (a_c − r b_c)² / (Σ_c b_c)²,

which for blocks of equal size is s/√n. They say how far the mean would move with other text of the
same kind; nothing about another training run (another seed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from polyak.data.batches import ValidationBatches
from polyak.data.left_out import skipped_files
from polyak.data.shards import TokenFile
from polyak.errors import ConfigError, DivergedError, RunError
from polyak.evaluation.subjects import BATCH, Subject, corpus_name, corpus_of, side_of

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
Tick = Callable[[int], None]
LOGITS = 1 << 26
"""Logits made at once, at most (256 MB in float32), unless one sequence has more."""
PIECE = 1 << 24


@dataclass(frozen=True)
class Losses:
    """The loss of every scored token, with what standard errors need to know about it.

    Attributes:
        nats: (N, T) in blocks of T.
        bytes: (N, T) bytes of text of each token.
        documents: (N, T) number of the document that each token is part of.
        corpus: the corpus's name.
        split: its side.
        fingerprint: SHA-256 of the blocks; equal ones hold the same tokens.
        stride: S; T for the plain form.
        left_out: files that the corpus does without, by reason.
    """

    nats: Array
    bytes: Ids
    documents: Ids
    corpus: str
    split: str
    fingerprint: str
    stride: int
    left_out: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """A sequence to run and the part of it that is scored.

    Attributes:
        start: place of its first input in the corpus.
        length: inputs.
        scored: the last so many targets are scored.
        place: of the first scored one among all that are, in order.
    """

    start: int
    length: int
    scored: int
    place: int


def windows(starts: Ids, length: int, stride: int) -> Iterator[Window]:
    """The windows that score the targets of blocks of `length` tokens, in order.

    Args:
        starts: places of the blocks' first inputs.
        length: T.
        stride: S, from 1 to T; the last window of a block scores what is left.
    """
    for row, block in enumerate(map(int, starts)):
        for done in range(0, length, stride):
            scored = min(stride, length - done)
            end = block + done + scored
            start = max(0, end - length)
            yield Window(start, end - start, scored, row * length + done)


def require_causal(subject: Subject) -> None:
    """Refuse a model that sees the tokens it is to predict.

    Raises:
        RunError: the model is not causal.
    """
    if not getattr(subject.model.config, "causal", True):
        raise RunError(
            f"{subject.name} is not causal (causal=False): it sees the tokens it would have to "
            "predict, so its next-token loss means nothing"
        )


def token_losses(
    subject: Subject,
    corpus: str | None = None,
    *,
    tokens: int,
    stride: int | None = None,
    split: str = "validation",
    text_field: str = "text",
    encoding: str = "utf-8",
    tick: Tick | None = None,
) -> Losses:
    """The loss of each token of evenly spaced blocks of a corpus.

    Args:
        subject: the model; dropout is off, and it computes in float32.
        corpus: see `subjects.corpus_of`; None: the run's own.
        tokens: at most so many are scored.
        stride: S, see above; T when left out.
        split: the side of the corpus.
        text_field: the field with the text of records.
        encoding: of text files and JSON.
        tick: called with the number of tokens scored, batch by batch.

    Raises:
        ConfigError: `tokens` is less than one block, or `stride` is not from 1 to T.
        DataError: the corpus is missing, too short, or has another tokenizer.
        RunError: the model is not causal.
        DivergedError: its losses are not finite.
    """
    require_causal(subject)
    length = subject.context_length
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(
            f"stride={stride} must be from 1 to {length}, the context of {subject.name}"
        )
    if tokens < length:
        raise ConfigError(
            f"tokens={tokens} is less than one block of {subject.name}; use at least {length}"
        )
    prepared = corpus_of(subject, corpus, text_field=text_field, encoding=encoding)
    side = side_of(prepared, split)
    blocks = ValidationBatches(side, length, BATCH, tokens)
    starts = blocks.starts
    targets = np.concatenate([batch[:, 1:] for batch in blocks])
    nats: Array = np.full(targets.size, np.nan)
    for group in _grouped(windows(starts, length, stride), _rows(subject, length)):
        _score(subject.model, side, group, subject.device, nats)
        if tick is not None:
            tick(len(group) * group[0].scored)
    nats = nats.reshape(targets.shape)
    if not np.isfinite(nats).all():
        raise DivergedError(
            f"{subject.name} has losses that are not finite on {corpus_name(prepared)}; its "
            "weights are damaged, or its training diverged"
        )
    return Losses(
        nats=nats,
        bytes=side.byte_table[targets],
        documents=documents(side, starts, length, subject.tokenizer.end_of_text),
        corpus=corpus_name(prepared),
        split=split,
        fingerprint=blocks.fingerprint,
        stride=stride,
        left_out=prepared.left_out,
    )


def _rows(subject: Subject, length: int) -> int:
    """Sequences at once."""
    vocabulary = int(subject.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    return max(1, min(BATCH, LOGITS // (length * vocabulary)))


def _grouped(every: Iterable[Window], rows: int) -> Iterator[list[Window]]:
    """Windows of equal form, at most `rows` together; within a form in order."""
    forms: dict[tuple[int, int], list[Window]] = {}
    for window in every:
        forms.setdefault((window.length, window.scored), []).append(window)
    for alike in forms.values():
        for first in range(0, len(alike), rows):
            yield alike[first : first + rows]


@torch.no_grad()
def _score(
    model: nn.Module, side: TokenFile, group: list[Window], device: torch.device, into: Array
) -> None:
    """Write the losses of some windows' scored targets to their places."""
    cut = np.stack([side[w.start : w.start + w.length + 1] for w in group]).astype(np.int64)
    ids, scored = torch.from_numpy(cut).to(device), group[0].scored
    logits: Tensor = model(ids[:, :-1])[:, -scored:]
    nats = F.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, -scored:].flatten(), reduction="none"
    )
    for window, found in zip(group, nats.view(-1, scored).cpu().numpy(), strict=True):
        into[window.place : window.place + scored] = found


def documents(side: TokenFile, starts: Ids, length: int, end_of_text: int) -> Ids:
    """Which document each target is part of, as the number of ends of text before it (N, T)."""
    numbers = np.empty((len(starts), length), dtype=np.int64)
    place = ended = 0
    for row, block in enumerate(map(int, starts)):
        while place < block + 1:  # the first target's place is one after the first input's
            stop = min(block + 1, place + PIECE)
            ended += int((side[place:stop] == end_of_text).sum())
            place = stop
        ends = side[place : place + length] == end_of_text
        numbers[row] = ended + np.cumsum(ends) - ends
    return numbers


def ratio(above: Array, below: Array) -> tuple[float, float | None]:
    """Σ above / Σ below over clusters, and its standard error; None for a single cluster."""
    value = float(above.sum() / below.sum())
    n = len(above)
    if n < 2:
        return value, None
    rest = above - value * below
    return value, math.sqrt(n / (n - 1) * float((rest**2).sum())) / float(below.sum())


def clusters(losses: Losses, over: str) -> NDArray[np.int64]:
    """(N·T,) the cluster of each token, numbered from 0: its block, or its document."""
    if over == "documents":
        return np.unique(losses.documents.ravel(), return_inverse=True)[1].reshape(-1)
    blocks, length = losses.nats.shape
    return np.repeat(np.arange(blocks), length)


def _sums(number: NDArray[np.int64], values: Array | None = None) -> Array:
    """Of each cluster the sum of its tokens' values, or the number of its tokens."""
    return np.asarray(np.bincount(number, values), dtype=np.float64)


def summary(losses: Losses) -> dict[str, Any]:
    """Loss, bits per byte and perplexity, each with its standard error; ready for JSON.

    The errors are over blocks or over documents, whichever is larger for the loss (`se_over`; None
    where there is a single block of a single document); perplexity's is exp(loss)·se.
    """
    nats, sizes = losses.nats.ravel(), losses.bytes.ravel().astype(np.float64)
    found: dict[str, tuple[Array, Array, Array]] = {}
    for over in ("blocks", "documents"):
        number = clusters(losses, over)
        found[over] = _sums(number, nats), _sums(number), _sums(number, sizes)
    errors = {over: ratio(sums, counts)[1] for over, (sums, counts, _) in found.items()}
    over = max(errors, key=lambda name: -1.0 if errors[name] is None else errors[name] or 0.0)
    sums, counts, bytes_ = found[over]
    loss, error = ratio(sums, counts)
    per_byte = ratio(sums / math.log(2), bytes_) if bytes_.sum() else (None, None)
    perplexity = math.exp(loss) if loss < 700 else None
    return {
        "corpus": losses.corpus,
        **skipped_files(losses.left_out),
        "split": losses.split,
        "fingerprint": losses.fingerprint,
        "stride": losses.stride,
        "context_length": losses.nats.shape[1],
        "tokens": losses.nats.size,
        "bytes": int(losses.bytes.sum()),
        "blocks": len(found["blocks"][0]),
        "documents": len(found["documents"][0]),
        "se_over": over if error is not None else None,
        "loss": {"value": loss, "se": error, "se_of": errors},
        "bits_per_byte": {"value": per_byte[0], "se": per_byte[1]},
        "perplexity": {
            "value": perplexity,
            "se": perplexity * error if perplexity is not None and error is not None else None,
        },
    }


def difference(one: Losses, base: Losses) -> dict[str, Any] | None:
    """Loss of one model minus another's on the same tokens, with the error of the pairs.

    None where the tokens are not the same. The error is over blocks or documents as in `summary`.
    """
    if one.fingerprint != base.fingerprint or one.stride != base.stride:
        return None
    gaps = (one.nats - base.nats).ravel()
    errors = []
    for over in ("blocks", "documents"):
        number = clusters(one, over)
        errors.append(ratio(_sums(number, gaps), _sums(number))[1])
    known = [error for error in errors if error is not None]
    return {"value": float(gaps.mean()), "se": max(known, default=None)}


def by_position(losses: Losses) -> dict[str, list[Any]]:
    """Mean loss at each position of a block (the token's number of inputs), over blocks."""
    blocks, length = losses.nats.shape
    errors = losses.nats.std(0, ddof=1) / math.sqrt(blocks) if blocks > 1 else [None] * length
    return {
        "position": list(range(1, length + 1)),
        "loss": losses.nats.mean(0).tolist(),
        "se": [None if error is None else float(error) for error in errors],
    }
