"""Losses, as weighted sums over a batch: Σ_i w_i L_i, with w_i = 1 / (images of the global batch).

Sums of this form add up over workers to the mean over the global batch, whatever the shares are.
A loss returns (logits, terms); terms["loss"] is what is minimised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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


def abn_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """ABN: cross entropy of the perception branch plus that of the attention branch; logits are perception's."""
    logits, _, attention_logits = model(batch.images)
    ce, attention_ce = ((F.cross_entropy(scores, batch.labels, reduction="none") * batch.weights).sum()
                        for scores in (logits, attention_logits))
    return logits, {"loss": ce + attention_ce, "ce": ce, "attention_ce": attention_ce}


def wae_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """WAE: cross entropy of C(m, z), z encoded from each image's map in the attribution's units."""
    if batch.maps is None:
        raise ValueError("wae needs a map for every image, and this batch has none")
    logits = model(batch.images, batch.maps)
    ce = (F.cross_entropy(logits, batch.labels, reduction="none") * batch.weights).sum()
    return logits, {"loss": ce}


def single_stage_loss(weight: float, auxiliary: float) -> Loss:
    """Equation (1) with a learning M: as `impactx_loss`, plus auxiliary * CE of M's own scores.

    An image without a map, as yet (NaNs where its map would be), has no part in the MSE; nor has any in a batch
    without maps.  An MSE of 0 then stands for "nothing to learn from".
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, maps, own = model(batch.images)
        ce = (F.cross_entropy(logits, batch.labels, reduction="none") * batch.weights).sum()
        # Without a target a map is its own: the decoder takes part with a gradient of 0, as data-parallel workers need.
        target = maps.detach() if batch.maps is None else torch.where(
            batch.maps.isnan().flatten(1).any(1)[:, None, None, None], maps.detach(), batch.maps)
        mse = ((maps - target).square().mean(dim=(1, 2, 3)) * batch.weights).sum()
        terms = {"loss": ce + weight * mse, "ce": ce, "mse": mse}
        if auxiliary:
            terms["auxiliary_ce"] = (F.cross_entropy(own, batch.labels, reduction="none") * batch.weights).sum()
            terms["loss"] = terms["loss"] + auxiliary * terms["auxiliary_ce"]
        return logits, terms

    return loss
