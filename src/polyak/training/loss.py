"""The training loss of a batch, as a module of its own: what DDP, FSDP2 and compile wrap."""

from __future__ import annotations

from torch import Tensor, nn

from polyak.nn.transformer import Transformer
from polyak.ops.linear_cross_entropy import linear_cross_entropy
from polyak.training.config.training import VocabularyLoss


class LossModule(nn.Module):
    """Summed cross-entropy in nats of the next tokens.

    Args:
        model: the model.
        method: how the loss over the vocabulary is computed, see `ops.linear_cross_entropy`.
    """

    def __init__(self, model: Transformer, method: VocabularyLoss = "auto") -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, batch: Tensor) -> Tensor:
        """The sum over a batch (b, T+1): inputs [:, :-1], targets [:, 1:]."""
        features = self.model.features(batch[:, :-1])
        return linear_cross_entropy(
            features.flatten(0, 1),
            self.model.head.weight,
            batch[:, 1:].flatten(),
            method=self.method,
        )
