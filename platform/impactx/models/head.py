"""The fully connected end of a classifier."""

from __future__ import annotations

from torch import Tensor, nn


class Head(nn.Module):
    """Hidden layers (none for timm's models, two for LeNet-5), then the last linear layer.

    It maps trunk features (B, trunk features) to logits (B, K); `hidden` gives the penultimate
    features (B, F) on the way.

    Args:
        hidden: The layers before the last one.
        last: The last layer, F -> K.
    """

    def __init__(self, hidden: nn.Sequential, last: nn.Linear) -> None:
        super().__init__()
        self.hidden = hidden
        self.last = last

    @property
    def in_features(self) -> int:
        """The number of trunk features."""
        return next(layer.in_features for layer in (*self.hidden, self.last)
                    if isinstance(layer, nn.Linear))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (B, K) of trunk features."""
        logits: Tensor = self.last(self.hidden(features))
        return logits


def linear_head(num_features: int, num_classes: int) -> Head:
    """Build one linear layer on the trunk's features: what timm's classifiers end with."""
    return Head(nn.Sequential(), nn.Linear(num_features, num_classes))
