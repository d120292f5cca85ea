"""The error of predicted maps, the second term of equation (1)."""

from __future__ import annotations

from torch import Tensor

from impactx.datasets.batches import Batch


def map_error(maps: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    """Return the weighted mean squared error of maps.

    Args:
        maps: Predicted maps, (B, C, H, W), in the units of the scaled maps.
        targets: The maps that are to be predicted, of the same shape and units. The error of an
            image is the mean over its C*H*W values.
        batch: The batch, for its weights.
    """
    return ((maps - targets).square().mean(dim=(1, 2, 3)) * batch.weights).sum()
