r"""A trained model as lm-evaluation-harness sees it: log-likelihoods and greedy continuations.

Needs the extra `[eval]`. What a request gets does not depend on the requests beside it, but for
the rounding of sums: requests are sorted by length, rows of a batch are padded on the right, which
a causal model does not see, and only continuations are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor

from polyak.data.tokenizers import Tokenizer
from polyak.evaluation.generation import complete
from polyak.evaluation.sampling_config import SamplingConfig
from polyak.nn.transformer import Transformer

_MAX_NEW_TOKENS = 256  # the harness's own default where a task names none

Request = tuple[tuple[str, str], list[int], list[int]]
Window = tuple[list[int], list[int]]
"""Inputs and targets: the targets are those of the last inputs."""


def windows(context: Sequence[int], continuation: Sequence[int], length: int) -> Iterator[Window]:
    """What a model of a context of `length` tokens reads to score every token of a continuation.

    One window with as much context before it as fits, if the continuation fits; else one for every
    `length` tokens of it, the last with as much context as fits: the harness's own rule for whole
    documents (`get_rolling_token_windows` with `context_len=1`).
    """
    tokens = [*context, *continuation]
    for start in range(len(context), len(tokens), length):
        end = min(start + length, len(tokens))
        yield tokens[max(0, end - 1 - length) : end - 1], tokens[start:end]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is untyped
    """The harness's interface to a model and its tokenizer.

    Args:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        batch_size: rows at once.

    Attributes:
        cut: requests so far whose context was longer than the model's and lost its beginning.
        requests: requests so far.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self._tokenizer = tokenizer
        self._length = model.config.context_length
        self._device = next(model.parameters()).device
        self.cut = self.requests = 0

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """What stands before texts that have no context: what texts begin with, or end with."""
        return (*self._tokenizer.prefix, self.eot_token_id)[0]

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, behind the tokenizer's prefix unless told not to, as in the harness's own."""
        prefix = () if add_special_tokens is False else self._tokenizer.prefix
        return [*prefix, *self._tokenizer.encode(string).tolist()]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Σ log p of each continuation, and whether every token of it is the likeliest."""
        jobs = [
            (number, window)
            for number, (_, context, continuation) in enumerate(requests)
            for window in windows(context, continuation, self._length)
        ]
        self.requests += len(requests)
        self.cut += sum(
            len(context) + min(len(continuation), self._length) > self._length + 1
            for _, context, continuation in requests
        )
        jobs.sort(key=lambda job: -len(job[1][0]))  # the largest batch first
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            scores = self._score([window for _, window in batch])
            for (number, _window), (value, likeliest) in zip(batch, scores, strict=True):
                sums[number] += value
                greedy[number] &= likeliest
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Σ log p of each whole text, its first token after `prefix_token_id`."""
        whole = [
            ((" ", text), [self.prefix_token_id], self.tok_encode(text, add_special_tokens=False))
            for text in (request.args[0] for request in requests)
        ]
        return [value for value, _ in self._loglikelihood_tokens(whole)]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continuations up to the first of each request's `until`; greedy unless it samples."""
        texts = [""] * len(requests)
        groups: dict[SamplingConfig, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_sampling(request.args[1]), []).append(number)
        for config, numbers in groups.items():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                prompts = [requests[number].args[0] for number in batch]
                found = complete(self.model, self._tokenizer, prompts, config, quiet=True)
                for number, completion in zip(batch, found, strict=True):
                    texts[number] = completion.text
        self.requests += len(requests)
        return texts

    @torch.inference_mode()
    def _score(self, batch: Sequence[Window]) -> list[tuple[float, bool]]:
        width = max(len(inputs) for inputs, _ in batch)
        ids = torch.tensor(
            [inputs + [0] * (width - len(inputs)) for inputs, _ in batch], device=self._device
        )
        features = self.model.features(ids)
        scored = torch.cat(  # the output matrix is applied to what is scored only
            [
                row[len(inputs) - len(targets) : len(inputs)]
                for row, (inputs, targets) in zip(features, batch, strict=True)
            ]
        )
        wanted = torch.tensor([t for _, targets in batch for t in targets], device=self._device)
        sizes = [len(targets) for _, targets in batch]
        values, likeliest = self._log_probabilities(scored, wanted)
        return [
            (float(value.sum()), bool(best.all()))
            for value, best in zip(
                torch.split(values, sizes), torch.split(likeliest, sizes), strict=True
            )
        ]

    def _log_probabilities(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p of each target in float64, and whether it is the likeliest token."""
        values, best = [], []
        for x, t in zip(torch.split(features, 1024), torch.split(targets, 1024), strict=True):
            logits = self.model.head(x)[:, : self._tokenizer.vocab_size].double()
            values.append(logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1))
            best.append(logits.argmax(1) == t)
        return torch.cat(values), torch.cat(best)


def _sampling(options: dict[str, Any]) -> SamplingConfig:
    """The harness's `generation_kwargs` as ours."""
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    sample = options.get("do_sample", False) and options.get("temperature", 1.0) > 0
    return SamplingConfig(
        max_new_tokens=int(
            options.get("max_gen_toks") or options.get("max_new_tokens") or _MAX_NEW_TOKENS
        ),
        temperature=float(options.get("temperature", 1.0)) if sample else 0.0,
        top_k=options.get("top_k") or None if sample else None,
        top_p=options.get("top_p") if sample else None,
        stop=tuple(text for text in until if text),
    )
