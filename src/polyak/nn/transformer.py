r"""`Transformer`: token ids → x and auxiliary streams → blocks → final norm → logits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak import rules
from polyak.errors import ConfigError
from polyak.nn.config import ModelConfig
from polyak.nn.norms import norm
from polyak.nn.oracles import MLP, Attention
from polyak.nn.splitting import SUBSTEPS, oracle_of
from polyak.rules import State, Stream, UpdateRule


class Embedding(nn.Module):
    """Learned token and position tables: (B, T) ids → (B, T, d)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context_length, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token plus position vectors."""
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """One layer: its oracles, and one instance of the rule for each substep."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rule = rules.get(config.rule)
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.rules = nn.ModuleDict(
            {
                substep: rule(
                    config.d_model,
                    config.num_heads,
                    norm_eps=config.norm_eps,
                    bias=config.bias,
                    options=config.rule_options,
                )
                for substep in SUBSTEPS[config.splitting]
            }
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step of the rule per substep; x is (B, T, d)."""
        rule: UpdateRule
        for substep, rule in self.rules.items():  # type: ignore[assignment]  # a Module to torch
            x, state = rule.step(x, state, oracle_of(substep, self.attention, self.mlp))
        return x, state


class Transformer(nn.Module):
    """A language model whose layers are optimizer steps.

    Initialisation, as released: token, position and stream tables and linear weights N(0, 0.02),
    the two output projections of a layer N(0, 0.02/√(2·layers)), LayerNorm weights 1, biases 0,
    rule scalars at their initial values.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # drawn before the modules are built, which draw too, and not equally for all rules
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.config = config
        self.embedding = Embedding(config)
        self.streams = nn.ModuleDict(
            {
                stream.name: Embedding(config)
                for stream in self.rule.streams
                if self._learned(stream)
            }
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights(seed)
        if config.tie_embeddings:
            self.head.weight = self.embedding.tokens.weight

    @property
    def rule(self) -> type[UpdateRule]:
        """The class of the model's update rule."""
        return rules.get(self.config.rule)

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
        modules = sorted(self.named_modules(), key=lambda named: named[0].startswith("streams."))
        for name, module in modules:
            if isinstance(module, nn.Linear):
                std = residual if name.endswith((".out", ".down")) else 0.02
                _draw_normal(module.weight, std, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                _draw_normal(module.weight, 0.02, generator)

    def start(self, input_ids: Tensor) -> tuple[Tensor, State]:
        """x (B, T, d) and the rule's streams before the first block, from ids (B, T)."""
        x = self.embedding(input_ids)
        starts = {stream.name: self._start(stream, input_ids, x) for stream in self.rule.streams}
        return x, self.rule.State(**starts)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, vocab) for the token after each position of ids (B, T).

        Raises:
            ConfigError: the sequence is longer than the context.
        """
        logits: Tensor = self.head(self.features(input_ids))
        return logits

    def features(self, input_ids: Tensor) -> Tensor:
        """What the output matrix is applied to: the last block's x after the final norm (B, T, d).

        Raises:
            ConfigError: the sequence is longer than the context.
        """
        if input_ids.shape[1] > self.config.context_length:
            raise ConfigError(
                f"a sequence of {input_ids.shape[1]} tokens is longer than "
                f"context_length={self.config.context_length}; shorten it"
            )
        x, state = self.start(input_ids)
        for block in self.blocks:
            x, state = block(x, state)
        features: Tensor = self.norm(x)
        return features

    def scalars(self) -> dict[str, dict[str, list[float]]]:
        """Learned scalars by name, substep and depth: `{"mu": {"attention": [...]}}`."""
        values: dict[str, dict[str, list[float]]] = {}
        for block in self.blocks:
            for substep, rule in block.rules.items():  # type: ignore[union-attr, operator]
                for name, value in rule.scalar_values().items():
                    values.setdefault(name, {}).setdefault(substep, []).append(value)
        return values

    def _learned(self, stream: Stream) -> bool:
        return stream.start == "embedding" and self.config.stream_start is None

    def _start(self, stream: Stream, input_ids: Tensor, x: Tensor) -> Tensor:
        if self._learned(stream):
            start: Tensor = self.streams[stream.name](input_ids)
            return start
        if stream.start == "embedding":  # the control: no tables of its own
            return torch.zeros_like(x)
        return stream.constant(x, self.config.num_heads)


def _draw_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    if not weight.is_meta:
        with torch.no_grad():
            weight.copy_(std * torch.randn(weight.shape, generator=generator))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters (tied weights once), counted on the meta device."""
    with torch.device("meta"):
        model: Any = Transformer(config)
    return sum(parameter.numel() for parameter in model.parameters())
