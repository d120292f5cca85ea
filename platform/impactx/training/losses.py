"""What losses have in common: weighted sums over a batch, sum_i w_i L_i.

With w_i = 1 / (images of the global batch), sums of this form add up over data-parallel workers to
the mean over the global batch, whatever the shares are. A loss returns (logits, terms), where
terms["loss"] is minimised and the others are recorded. The loss of an approach stands with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from impactx.datasets.batches import Batch

Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]


def cross_entropy(scores: Tensor, batch: Batch) -> Tensor:
    """Return the weighted cross entropy of scores (B, K), in nats."""
    return (F.cross_entropy(scores, batch.labels, reduction="none") * batch.weights).sum()


def classification_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits (B, K) of a classifier and their cross entropy (paper 3.3, stage 1)."""
    logits = model(batch.images)
    return logits, {"loss": cross_entropy(logits, batch)}
