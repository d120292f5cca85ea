"""A model as a plain classifier, for whoever explains it."""

from __future__ import annotations

from torch import Tensor, nn


class Logits(nn.Module):
    """Images -> logits (B, K) alone, of a model that gives more."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.classify(x)  # type: ignore[operator]
