r"""`Transformer`: token ids → x and auxiliary streams → blocks → final norm → logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyak.nn import attention
from polyak.nn.attention import Attention
from polyak.nn.cache import Cache
from polyak.nn.config import ModelConfig
from polyak.nn.context import Context, context_of
from polyak.nn.controls import REINJECTED
from polyak.nn.embedding import Embedding
from polyak.nn.mlp import MLP
from polyak.nn.norms import gain_norm, norm
from polyak.nn.placement import Placed, Placement, placement_of, start_of, step
from polyak.nn.splitting import norm_after, oracle_of
from polyak.ops import axpy
from polyak.rules import State, Stream, UpdateRule


class Block(nn.Module):
    """One layer: its oracles, and one instance of a rule for each substep."""

    def __init__(
        self, config: ModelConfig, rules: Mapping[str, Placed], kind: type[Attention]
    ) -> None:
        super().__init__()
        self.post_norm = config.norm_position == "post"
        self.attention = kind(config)
        self.mlp = MLP(config)
        self.rules = nn.ModuleDict(
            {substep: placed.make(config) for substep, placed in rules.items()}
        )
        reinjected = config.embedding_reinjection
        self.reinjection_raw = nn.Parameter(torch.full((1,), 0.1)) if reinjected else None

    def forward(
        self, x: Tensor, state: State, context: Context | None = None
    ) -> tuple[Tensor, State]:
        """One step of the rule per substep; x is (B, T, d), and normed after it if post-norm."""
        x = self.reinjected(x, state)
        rule: UpdateRule
        for substep, rule in self.rules.items():  # type: ignore[assignment]  # a Module to torch
            oracle = oracle_of(substep, self.attention, self.mlp, context)
            x, state = step(rule, x, state, oracle)
            if self.post_norm:
                x = norm_after(substep, self.attention, self.mlp)(x)
        return x, state

    def reinjected(self, x: Tensor, state: State) -> Tensor:
        """What the layer steps from: x, or x + ω LN(E) with `embedding_reinjection`."""
        raw = self.reinjection_raw
        return x if raw is None else axpy(raw, getattr(state, REINJECTED), x)


class Transformer(nn.Module):
    """A language model whose layers are optimizer steps.

    Initialisation, as released: token, position and stream tables and linear weights N(0, 0.02),
    the two output projections of a layer N(0, 0.02/√(2·layers)), norm weights 1, biases 0,
    rule scalars at their initial values. Tokens beside sinusoids of amplitude 1 are N(0, 1), as
    in the release that has them (arXiv:2208.00579), unless their table is the output matrix too.
    `ModelConfig.embedding_std` says otherwise of the token table alone.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # drawn before the modules are built, which draw too, and not equally for all rules
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.config = config
        self.placement: Placement = placement_of(config)  # read once: a file may change or go
        self.embedding = Embedding(config)
        starts = {stream.name: start_of(stream, config) for stream in self.placement.streams}
        self.streams = nn.ModuleDict(
            {
                name: Embedding(config, name)
                for name, start in starts.items()
                if start == "embedding"
            }
        )
        self.starts = nn.ModuleDict(
            {name: gain_norm(config) for name, start in starts.items() if start == "x"}
        )
        kind = attention.get(config.attention)
        self.attention_scalars = nn.ParameterDict()
        """Raw coefficients that the kind of attention learns one of for the whole model."""
        options = kind.resolve(config.attention_options, causal=config.causal)
        for name, raw in kind.raw_coefficients(options, "model").items():
            self.attention_scalars[name] = nn.Parameter(torch.full((1,), raw))
        self._recurrent = kind.recurrent
        self.blocks = nn.ModuleList(Block(config, placed, kind) for placed in self.placement.layers)
        self.norm = norm(config)
        self.head = nn.Linear(config.stream_width, config.vocab_size, bias=False)
        self.init_weights(seed)
        if config.tie_embeddings:
            self.head.weight = self.embedding.tokens.weight

    @property
    def rule(self) -> type[UpdateRule]:
        """The class of the model's update rule.

        Raises:
            ConfigError: it has several; `placement` says which steps where.
        """
        return self.placement.only

    @property
    def recurrent(self) -> bool:
        """Whether attention remembers a state of constant size instead of keys and values."""
        return self._recurrent

    @property
    def sees_length(self) -> bool:
        """Whether logits depend on how many tokens follow, so that nothing can be cached."""
        return any(block.attention.sees_length for block in self.blocks)  # type: ignore[union-attr]

    @property
    def longest(self) -> int | None:
        """Most tokens of a sequence; None where neither positions nor memory set an end.

        That is where attention remembers a state of constant size, and positions are no table.
        """
        endless = self._recurrent and self.config.positions != "learned"
        return None if endless else self.config.context_length

    def init_weights(self, seed: int | None = None) -> None:
        """Draw every weight anew (see the class docstring).

        Tables of auxiliary streams are drawn last, so that with one seed the weights that two
        rules have in common start equal. Draws are made on the CPU: the device changes nothing.

        Args:
            seed: of the draws; None takes one from torch's default generator.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        beside = self.config.positions == "sinusoidal" and not self.config.tie_embeddings
        std = self.config.embedding_std
        unit = std if std is not None else 1.0 if beside else 0.02
        modules = sorted(self.named_modules(), key=lambda named: named[0].startswith("streams."))
        for name, module in modules:
            if isinstance(module, nn.Linear):
                std = residual if name.endswith((".out", ".down")) else 0.02
                _draw_normal(module.weight, std, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                _draw_normal(module.weight, unit if name == "embedding.tokens" else 0.02, generator)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab) for the token after each position of ids (B, T).

        Args:
            input_ids: the tokens; with a cache, those after the cached ones.
            attention_mask: (B, S), true or 1 for real tokens and false or 0 for padding, which
                nothing attends to; S counts cached tokens too.
            position_ids: (B, T); default 0, 1, … from the first real token. A model with
                positions=none has no use for them.
            cache: keys and values (or states) of the tokens before, to which those of these are
                appended: `polyak.nn.cache.KeyValueCache`, or a cache of transformers.

        Raises:
            ConfigError: the sequence is longer than the context, or an argument does not fit.
        """
        logits: Tensor = self.head(
            self.features(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache
            )
        )
        return logits

    def features(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the output matrix is applied to: the last block's x after the final norm (B, T, d).

        Arguments and errors are those of `forward`.
        """
        context = self.context(input_ids, attention_mask, position_ids, cache)
        x, state = self._start(input_ids, context)
        for block in self.blocks:
            x, state = block(x, state, context)
        features: Tensor = self.norm(x)
        return features

    def start(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, State]:
        """x (B, T, d) and the rule's streams before the first block, from ids (B, T).

        Arguments and errors are those of `forward`.
        """
        context = self.context(input_ids, attention_mask, position_ids, cache)
        return self._start(input_ids, context)

    def context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Context | None:
        """What `forward` passes to every block, for passes that go from block to block.

        None where there is nothing to pass: whole sequences without padding, whose positions are
        not rotary (layers share a table of those), and no coefficient of attention that is the
        model's. One context serves one pass. Arguments and errors are those of `forward`.
        """
        return context_of(
            self.config,
            input_ids,
            attention_mask,
            position_ids,
            cache,
            longest=self.longest,
            shared=self.attention_scalars or None,  # type: ignore[arg-type]  # torch's own mapping
        )

    def scalars(self) -> dict[str, dict[str, list[float | None]]]:
        """Learned scalars by name, substep and depth: `{"mu": {"attention": [...]}}`.

        None at layers whose rule has no such scalar. Those of the kind of attention are
        `attention.mu`, under the substep `attention`.
        """
        values: dict[str, dict[str, list[float | None]]] = {}

        def put(name: str, substep: str, layer: int, value: float) -> None:
            nothing: list[float | None] = [None] * len(self.blocks)
            values.setdefault(name, {}).setdefault(substep, nothing)[layer] = value

        for layer, block in enumerate(self.blocks):
            for substep, rule in block.rules.items():  # type: ignore[union-attr, operator]
                for name, value in rule.scalar_values().items():
                    put(name, substep, layer, value)
            raw: Any = block.reinjection_raw
            if raw is not None:
                put("reinjection", "layer", layer, float(raw.detach()))
            kind: Any = block.attention
            for name, value in kind.scalar_values(self.attention_scalars).items():
                put(f"attention.{name}", "attention", layer, value)
        return values

    def _start(self, input_ids: Tensor, context: Context | None) -> tuple[Tensor, State]:
        x = self.embedding(input_ids, context)
        starts = {s.name: self._start_of(s, input_ids, x, context) for s in self.placement.streams}
        return x, self.placement.State(**starts)

    def _start_of(
        self, stream: Stream, input_ids: Tensor, x: Tensor, context: Context | None
    ) -> Tensor:
        if stream.name in self.streams:
            start: Tensor = self.streams[stream.name](input_ids, context)
        elif stream.name in self.starts:
            start = self.starts[stream.name](x)
        elif stream.start == "embedding":  # the control: no tables of its own
            start = torch.zeros_like(x)
        else:
            start = stream.constant(x, self.config.num_heads)
        return start


def _draw_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    if not weight.is_meta:
        with torch.no_grad():
            weight.copy_(std * torch.randn(weight.shape, generator=generator))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters (tied weights once), counted on the meta device."""
    with torch.device("meta"):
        model: Any = Transformer(config)
    return sum(parameter.numel() for parameter in model.parameters())
