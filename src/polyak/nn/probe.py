r"""Probes: what every rule and every kind of attention must keep, tried before hours depend on it.

A position's logits may depend on its own token and those before it, in its own row, and on
nothing else: not on later tokens, on other rows of the batch, on how many of either there are, or
on random numbers that no seed of torch's decides. A piece that breaks this trains all the same, to
a loss that means nothing.

The probed model has the pieces, options and backbone of the configured one at a small size, in
float64, on the CPU. What it learns is drawn at random, so that nothing hides behind a coefficient
that starts at zero; what is frozen stays. Passes are made in training and in evaluation mode, at
lengths 1, 2, 17 and the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from polyak.errors import AttentionError, PolyakError, RuleError
from polyak.nn.attention import Attention
from polyak.nn.config import ModelConfig
from polyak.nn.pieces import AXES, named_pieces
from polyak.nn.placement import own_streams
from polyak.nn.rule_places import is_composite, short
from polyak.nn.transformer import Transformer
from polyak.rules import UpdateRule

LENGTHS = (1, 2, 17)
TOLERANCE = 1e-9
"""Largest difference, relative to the largest logit, where the order of sums may change."""
VOCABULARY, LAYERS, HEADS, HEAD_WIDTH, ROWS = 61, 2, 2, 8, 2
TOKENS = 2**12
"""Of one pass that looks for later tokens: 32 boundaries in 128 tokens, 4 in 1,024."""


def has_foreign_pieces(config: ModelConfig) -> bool:
    """Whether a model has pieces that did not come with this package, whose tests probe its own."""
    return any(name not in AXES[axis].own_names for axis, name in named_pieces(config))


def probe(config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Try the pieces of a model.

    Probing leaves torch's generators as they are.

    Args:
        config: the model; its sizes are made smaller, except where its rule needs them as they are.
        dtype: what the run computes in, where the logits must be finite too; with
            `torch.bfloat16`, under autocast.

    Raises:
        RuleError: what fails, in one line with the size of the leak.
        AttentionError: the same where only the kind of attention is foreign.
    """
    with torch.random.fork_rng(devices=[]):
        probed = _Probed(config)
        for training in (True, False):
            probed.model.train(training)
            for length in sorted({min(n, config.context_length) for n in LENGTHS}):
                probed.check(length)
            if config.context_length > max(LENGTHS):
                probed.check(config.context_length)
        probed.check_finite(dtype)


class _Probed:
    """A small model with random weights, and what it must keep."""

    def __init__(self, config: ModelConfig) -> None:
        self.said_of, self.error = _suspect(config)
        try:
            self.model = _drawn(_small(config))
            self._check_step()
        except Exception:  # a user's rule may be written for one width
            self.model = _drawn(
                dataclasses.replace(config, num_layers=_layers(config), dropout=0.0)
            )
            self._check_step()
        self.model.double()
        self.vocabulary = self.model.config.vocab_size
        self.drew = False

    def check(self, length: int) -> None:
        """Every probe at one length, in the model's mode."""
        ids = torch.randint(self.vocabulary, (ROWS, length))
        logits = self._logits(ids)
        scale = float(logits.abs().max())
        if not torch.isfinite(logits).all():
            self._refuse("gives logits that are not finite in float64", length)
        leak = _difference(self._logits(ids), logits) / scale
        if not leak <= TOLERANCE:
            self._refuse(
                f"gives other logits when run again with the same seed (by {leak:.1e} of the "
                "largest); keep nothing on self, and draw random numbers with torch only",
                length,
            )
        self._check_rows(ids, logits, scale)
        if self.model.config.causal and length > 1:
            self._check_later_tokens(length)
            if not (self.drew or self.sees_length):
                self._check_appended(ids, logits, scale)

    def check_finite(self, dtype: torch.dtype) -> None:
        """A pass over a whole context in the run's own precision."""
        half = dtype == torch.bfloat16
        self.model.to(torch.float32 if half else dtype).train()
        ids = torch.randint(self.vocabulary, (1, self.model.config.context_length))
        with torch.autocast("cpu", dtype=dtype) if half else nullcontext():
            logits = self._logits(ids)
        if not torch.isfinite(logits).all():
            kind = str(dtype).removeprefix("torch.")
            self._refuse(f"gives logits that are not finite in {kind}", ids.shape[1])

    def _check_rows(self, ids: Tensor, logits: Tensor, scale: float) -> None:
        length, other = ids.shape[1], ids.clone()
        other[0] = (other[0] + 1) % self.vocabulary
        found = {"another row changes": _difference(self._logits(other)[1:], logits[1:])}
        if not self.drew:  # what is drawn belongs to a place in the batch
            order = torch.arange(ROWS).flip(0)
            found["rows change places"] = _difference(self._logits(ids[order]), logits[order])
            found["rows are joined"] = _difference(self._logits(ids[:1]), logits[:1])
        for what, difference in found.items():
            if not difference / scale <= TOLERANCE:
                self._refuse(
                    f"mixes the rows of a batch: a row's logits change by {difference:.2g} when "
                    f"{what}",
                    length,
                )

    def _check_later_tokens(self, length: int) -> None:
        """Row by row, all tokens from a boundary on are changed: before it, nothing may move."""
        rows = min(length - 1, max(4, TOKENS // length))
        boundaries = torch.linspace(1, length - 1, rows).round().long()
        ids = torch.randint(self.vocabulary, (1, length)).expand(rows, -1)
        later = torch.arange(length) >= boundaries[:, None]
        changed = torch.where(later, (ids + 1) % self.vocabulary, ids)
        moved = (self._logits(changed) - self._logits(ids)).abs().amax(-1)
        moved = torch.where(later, moved.new_zeros(()), moved)
        if not bool((moved == 0).all()):
            worst = int(moved.nan_to_num(torch.inf).argmax())
            row, position = divmod(worst, length)
            self._refuse(
                f"sees later tokens: the logits at position {position + 1} change by "
                f"{float(moved.flatten()[worst]):.2g} when tokens from {int(boundaries[row]) + 1} "
                "on change",
                length,
            )

    def _check_appended(self, ids: Tensor, logits: Tensor, scale: float) -> None:
        length = ids.shape[1]
        for kept in sorted({1, length // 2, length - 1} - {0}):
            difference = _difference(self._logits(ids[:1, :kept]), logits[:1, :kept])
            if not difference / scale <= TOLERANCE:
                self._refuse(
                    f"sees how many tokens follow: the logits of {kept} change by "
                    f"{difference:.2g} when {length - kept} are appended",
                    length,
                )

    def _logits(self, ids: Tensor) -> Tensor:
        """One pass with a seed of its own; notes whether the model draws random numbers."""
        torch.manual_seed(0)
        before = torch.get_rng_state()
        try:
            with torch.set_grad_enabled(self.model.training):
                logits: Tensor = self.model(ids)
        except PolyakError:
            raise
        except Exception as error:  # a user's step may raise anything
            self._refuse(f"fails: {_line(error)}", ids.shape[1], error)
        self.drew = self.drew or not torch.equal(before, torch.get_rng_state())
        return logits.detach()

    def _refuse(self, what: str, length: int, cause: Exception | None = None) -> None:
        mode = "training" if self.model.training else "evaluation"
        tokens = f"{length} token{'s' if length > 1 else ''}"
        raise self.error(f"{self.said_of} {what} ({mode} mode, {tokens})") from cause

    @property
    def sees_length(self) -> bool:
        """Whether the kind of attention says that the number of later tokens counts."""
        kinds = [block.attention for block in self.model.blocks]
        return any(isinstance(kind, Attention) and kind.sees_length for kind in kinds)

    @torch.no_grad()
    def _check_step(self) -> None:
        """One step of every substep's rule on two sequences of one token: what it returns.

        Without this, the x that a user's `step` returns alone, without the state, would be taken
        apart along the batch.
        """
        name = short(self.model.config.rule)
        each: list[Any] = [rule for block in self.model.blocks for rule in block.rules.values()]  # type: ignore[operator]
        for rule in each:
            assert isinstance(rule, UpdateRule)
            x, state = self.model.start(torch.zeros(2, 1, dtype=torch.int64))
            state = own_streams(rule, state)
            try:
                found: Any = rule.step(x, state, torch.zeros_like)
            except PolyakError:
                raise
            except Exception as error:
                raise RuleError(f"rule {name}: its step fails: {_line(error)}") from error
            wrong = _wrong(found, x, state)
            if wrong:
                raise RuleError(f"rule {name}: step must return (x, state), but {wrong}")


def _suspect(config: ModelConfig) -> tuple[str, type[PolyakError]]:
    """What a leak is said of, and the error: the pieces that did not come with this package."""
    own = {a for a, name in named_pieces(config) if name not in AXES[a].own_names}
    foreign = [axis for axis in AXES if axis in own]
    named = [f"{axis} {short(getattr(config, axis))}" for axis in foreign or ["rule"]]
    return " with ".join(named), AttentionError if foreign == ["attention"] else RuleError


def _small(config: ModelConfig) -> ModelConfig:
    """The same pieces and backbone at a size that is quick in float64; no dropout."""
    heads = min(HEADS, config.num_heads)
    width = min(HEAD_WIDTH, config.d_model // config.num_heads)
    return dataclasses.replace(
        config,
        num_layers=_layers(config),
        residual_width=None if config.residual_width is None else 2 * heads * width,
        num_heads=heads,
        num_kv_heads=None if config.kv_heads == config.num_heads else 1,
        d_model=heads * width,
        head_dim=None if config.head_dim is None else min(HEAD_WIDTH, config.head_dim),
        mlp_width=None,
        vocab_size=VOCABULARY,
        dropout=0.0,
    )


def _layers(config: ModelConfig) -> int:
    """As many as are enough; all of them where each may have rules of its own."""
    return config.num_layers if is_composite(config.rule) else min(LAYERS, config.num_layers)


@torch.no_grad()
def _drawn(config: ModelConfig) -> Transformer:
    """A model whose every learned number is drawn."""
    torch.manual_seed(0)
    model = Transformer(config)
    tables = {
        id(module.weight): 1.0 if isinstance(module, nn.Embedding) else module.in_features**-0.5
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    for parameter in _learned(model):
        drawn = torch.randn_like(parameter)
        if id(parameter) in tables:
            parameter.copy_(tables[id(parameter)] * drawn)
        else:  # coefficients, norms, biases, and what a user's rule learns
            parameter.add_(0.4 * drawn)
    return model


def _learned(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _wrong(found: Any, x: Tensor, state: Any) -> str | None:
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"{len(found)} values" if isinstance(found, tuple) else _kind(found)
        return f"it returns {what}"
    new_x, new_state = found
    if (problem := _differs(new_x, x)) is not None:
        return f"its x is {problem}"
    if not isinstance(new_state, type(state)):
        return f"its state is {_kind(new_state)}; return state.replace(...)"
    for name in state._fields:
        problem = _differs(getattr(new_state, name), getattr(state, name))
        if problem is not None:
            return f"its state.{name} is {problem}"
    return None


def _differs(found: Any, like: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return _kind(found)
    if found.shape != like.shape:
        return f"of shape {tuple(found.shape)} where it was given {tuple(like.shape)}"
    if found.dtype != like.dtype:
        return f"{found.dtype} where it was given {like.dtype}"
    return None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing"
