"""An ensemble of classifiers A: what twice the cost of A buys without any explanation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from impactx.models.classifier import Classifier


class Ensemble(nn.Module):
    """x (B, 3, H, W), float, in [0, 1], native size -> the logarithm of the members' mean probabilities (B, K).

    These are logits: their softmax is the mean itself.
    """

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def num_classes(self) -> int:
        return self.members[0].num_classes  # type: ignore[return-value]

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width)."""
        return self.members[0].image_size  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.stack([member(x).log_softmax(1) for member in self.members])
        return scores.logsumexp(0) - math.log(len(self.members))

    def classify(self, x: Tensor) -> Tensor:
        """The same as forward."""
        return self(x)
