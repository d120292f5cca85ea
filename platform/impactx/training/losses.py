"""Losses, as weighted sums over a batch: Σ_i w_i L_i, with w_i = 1 / (images of the global batch).

Sums of this form add up over workers to the mean over the global batch, whatever the shares are.
A loss returns (logits, terms); terms["loss"] is what is minimised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from impactx.datasets.batches import Batch

Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]


def classification_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Stage 1: cross entropy of A's K scores, natural logarithm. Logits are (B, K)."""
    logits = model(batch.images)
    ce = (F.cross_entropy(logits, batch.labels, reduction="none") * batch.weights).sum()
    return logits, {"loss": ce}


def impactx_loss(weight: float) -> Loss:
    """Stage 2, equation (1): CE(y, C(m, z)) + weight * MSE(r, LEP-D(x)).

    The MSE is the mean over a map's C*H*W values, in the units of the scaled maps. With weight 0 the
    decoder gets zero gradients and stays as it was initialised. Needs batches with maps.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.maps is None:
            raise ValueError("stage 2 needs a map for every image, and this batch has none")
        logits, maps = model(batch.images)
        ce = (F.cross_entropy(logits, batch.labels, reduction="none") * batch.weights).sum()
        mse = ((maps - batch.maps).square().mean(dim=(1, 2, 3)) * batch.weights).sum()
        return logits, {"loss": ce + weight * mse, "ce": ce, "mse": mse}

    return loss
