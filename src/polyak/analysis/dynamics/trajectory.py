r"""x and a rule's streams at every substep of a forward pass, as the model itself makes it.

x₀, …, x_S are what the S substeps take and leave: x_s enters substep s + 1, x_S the final norm.
A layer has a substep for each oracle, or one for both (`splitting=simultaneous`). Of a plain
Hugging Face model a substep is a whole block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polyak.analysis._common import check_model, logits_of, math_attention
from polyak.errors import ConfigError
from polyak.nn.transformer import Transformer
from polyak.rules import Oracle, UpdateRule

AT_ONCE = 8
"""Sequences of one pass."""
AGREE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How closely norm and head must give the model's own logits, relative to their size."""


@dataclass(frozen=True, eq=False)
class Substep:
    """One step of a rule.

    Attributes:
        layer: from 0.
        kind: `attention`, `mlp`, or `layer` for both at once.
        rule: that stepped.
        block: its block.
        x: before it, (B, T, d).
        state: the rule's streams before it.
        after: the rule's streams after it.
        oracle: what it asks: (B, T, d) → (B, T, d), with its pre-norm.
        points: where it asked, each (B, T, d).
        values: the answers.
    """

    layer: int
    kind: str
    rule: UpdateRule
    block: Any
    x: Tensor
    state: Any
    after: Any
    oracle: Oracle
    points: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(eq=False)
class Trajectory:
    """One forward pass.

    Attributes:
        xs: x₀, …, x_S, each (B, T, d).
        substeps: the S steps; none of a plain Hugging Face model, which has no rule.
    """

    xs: list[Tensor] = field(default_factory=list)
    substeps: list[Substep] = field(default_factory=list)

    @property
    def updates(self) -> list[Tensor]:
        """x_{s+1} − x_s, S of them."""
        return [after - before for before, after in zip(self.xs, self.xs[1:], strict=False)]


class Watched:
    """A copy of a causal model that tells what its substeps do; the model is not changed.

    Args:
        model: a `Transformer`, or a Hugging Face causal language model; in eval mode.
        dtype: of the computation.

    Raises:
        ConfigError: the model has one layer, or another kind of layers than these two.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        if dtype not in AGREE:
            raise ConfigError(f"dtype={dtype} must be float64 or float32")
        self.original, self.dtype = model, dtype
        self.model: Any = copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
        self.ours = isinstance(model, Transformer)
        config = getattr(model, "config", None)
        layers = getattr(config, "num_layers" if self.ours else "num_hidden_layers", None)
        if not isinstance(layers, int):
            raise ConfigError(
                f"{type(model).__name__} does not say how many layers it has; dynamics are of "
                "polyak's models and Hugging Face causal language models"
            )
        if layers < 2:
            raise ConfigError(
                f"the model has {layers} layer, and dynamics are along depth; take one of at "
                "least two"
            )
        self.layers, self._made, self._checked = layers, Trajectory(), False
        if self.ours:
            self._watch()

    @property
    def labels(self) -> list[str]:
        """Names of x₀, …, x_S: `start`, `1 attention`, `1 mlp`, …, or `1`, `2`, …"""
        if not self.ours:
            return ["start", *(str(layer + 1) for layer in range(self.layers))]
        steps = [(n, kind) for n, block in enumerate(self.model.blocks) for kind in block.rules]
        return ["start", *(f"{layer + 1} {kind}" for layer, kind in steps)]

    def check(self, ids: Tensor) -> None:
        """See that the model can be looked at on these tokens, once.

        Args:
            ids: (N, T+1) integers: inputs [:, :-1], targets [:, 1:].

        Raises:
            ConfigError: it is not causal, not deterministic or not finite, or has dropout on.
            DataError: no tokens, or ids that the model does not know.
        """
        if not self._checked:
            check_model(self.original, ids)
            self._checked = True

    def passes(self, ids: Tensor) -> Iterator[tuple[Tensor, Trajectory]]:
        """(ids, their trajectory), a few sequences at a time; see `check` for what is refused."""
        self.check(ids)
        for some in torch.split(ids, AT_ONCE):
            yield some, self.run(some[:, :-1])

    @torch.no_grad()
    def run(self, input_ids: Tensor) -> Trajectory:
        """The trajectory of ids (B, T).

        Raises:
            ConfigError: a rule's streams cannot be read, or the head is no norm and matrix.
        """
        with math_attention():
            return self._run(input_ids) if self.ours else self._run_plain(input_ids)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The model's final norm and head on x (B, T, d): (B, T, vocab)."""
        found: Tensor = self._head(self._norm(x))
        return found

    # a model of ours

    def _watch(self) -> None:
        self._norm, self._head = self.model.norm, self.model.head
        for layer, block in enumerate(self.model.blocks):
            for kind, rule in block.rules.items():
                setattr(rule, "step", self._told(layer, kind, rule, block))  # noqa: B010  # a method

    def _told(self, layer: int, kind: str, rule: Any, block: Any) -> Callable[..., Any]:
        own = rule.step

        def step(x: Tensor, state: Any, oracle: Oracle) -> Any:
            points: list[Tensor] = []
            values: list[Tensor] = []

            def asked(point: Tensor) -> Tensor:
                value = oracle(point)
                points.append(point)
                values.append(value)
                return value

            moved = own(x, state, asked)
            after = _state_of(rule, x, moved)
            self._made.xs.append(x)
            told = Substep(
                layer, kind, rule, block, x, state, after, oracle, tuple(points), tuple(values)
            )
            self._made.substeps.append(told)
            return moved

        return step

    def _run(self, input_ids: Tensor) -> Trajectory:
        made = self._made = Trajectory()
        handle = self._norm.register_forward_pre_hook(lambda _, given: made.xs.append(given[0]))
        try:
            logits = self.model(input_ids)
        finally:
            handle.remove()
        self._made = Trajectory()
        return self._agreed(made, logits)

    # a plain model

    def _run_plain(self, input_ids: Tensor) -> Trajectory:
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []

        def note(module: nn.Module, given: Any, out: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(out, Tensor):
                seen.append((module, given[0], out))

        single = [m for m in self.model.modules() if "norm" in type(m).__name__.lower()]
        handles = [module.register_forward_hook(note) for module in single]
        try:
            found = self.model(input_ids, output_hidden_states=True, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        hidden = list(getattr(found, "hidden_states", None) or ())
        # transformers gives the last one after the final norm: here it is what that norm takes
        last = [(m, x) for m, x, y in seen if hidden and y.data_ptr() == hidden[-1].data_ptr()]
        self._head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if len(last) != 1 or self._head is None or len(hidden) != self.layers + 1:
            raise ConfigError(
                f"the final norm and head of {type(self.original).__name__} cannot be found, so "
                "nothing can be read off its layers"
            )
        self._norm = last[0][0]
        return self._agreed(
            Trajectory([*hidden[:-1], last[0][1]]), logits_of(self.model, input_ids)
        )

    def _agreed(self, made: Trajectory, logits: Tensor) -> Trajectory:
        error = float((self.logits(made.xs[-1]) - logits).abs().max())
        if not error <= AGREE[self.dtype] * max(1.0, float(logits.abs().max())):
            raise ConfigError(
                f"the logits of {type(self.original).__name__} are not its final norm and head on "
                "its last hidden state, so nothing can be read off its layers"
            )
        return made


def _state_of(rule: UpdateRule, x: Tensor, moved: Any) -> Any:
    """The state that a step left, where it is what the rule declares.

    Raises:
        ConfigError: it is not.
    """
    names = [stream.name for stream in rule.streams]
    where = f"the streams of rule {type(rule).__name__} cannot be read"
    if not isinstance(moved, tuple) or len(moved) != 2:
        raise ConfigError(f"{where}: step must return x and the state")
    after = moved[1]
    for name in names:
        value = getattr(after, name, None)
        if not isinstance(value, Tensor) or value.dim() < 3 or value.shape[:2] != x.shape[:2]:
            raise ConfigError(f"{where}: {name!r} is no tensor of shape (batch, time, …) after it")
    return after
