"""A model as a plain classifier, for whoever explains it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Logits(nn.Module):
    """Images -> logits (B, K) alone, of a model that gives more.

    Args:
        net: A model with `classify`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits (B, K) of images (B, 3, H, W)."""
        net: Any = self.net
        logits: Tensor = net.classify(x)
        return logits
