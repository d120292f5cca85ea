"""Weighted average explanations: one map for all classes, weighted by the model's probabilities.

Apicella et al. 2023, the paper's reference [7]: the map of an image is sum_k p_k r_k, where r_k is
the map of class k and p_k the probability that the model gives it. No label is needed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from impactx.explain.attribution import Attribution, Explanations
from impactx.explain.scores import Score, chunks, open_images

BLOCK = 64  # images a forward where only their probabilities are wanted


@torch.no_grad()
def class_probabilities(
    score: Score, images: np.ndarray, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Return the probabilities that a model gives its classes.

    Args:
        score: The model, float32 (B, C, H, W) in [0, 1] to logits (B, K).
        images: uint8 (N, H, W, C).
        device: Where the model runs.

    Returns:
        float64 (N, K).
    """
    probabilities = []
    for part in chunks(len(images), BLOCK):
        x, _ = open_images(images[part], np.zeros(len(images[part])), device)
        probabilities.append(score(x).double().softmax(1).cpu().numpy())
    return np.concatenate(probabilities)


def explain_by_own_probabilities(
    attribution: Attribution, model: nn.Module, images: np.ndarray, *,
    device: torch.device | str = "cpu", memory_bytes: int = 2**29,
    indices: np.ndarray | None = None,
) -> Explanations:
    """Explain all classes together, weighted by the model's own probabilities of each image.

    Args:
        attribution: The method that makes the maps.
        model: The explained model, in eval mode, on the device.
        images: uint8 (N, H, W, C).
        device: Where the model runs.
        memory_bytes: See `Attribution.explain`.
        indices: See `Attribution.explain`.

    Returns:
        One map for each image; scores and base values are weighted sums as well.

    Raises:
        AttributionError: See `Attribution.explain`.
        MaskerError: See `Attribution.explain`.
    """
    weights = class_probabilities(model, images, device)
    return attribution.explain_weighted(model, images, weights, device=device,
                                        memory_bytes=memory_bytes, indices=indices)
