"""Weighted average explanations: r̄ = Σ_k w_k r_k, the maps of all classes weighted, of which only the sum is kept.

The batched partition explainer explains the weighted sum of scores g(x) = Σ_k w_k f_k(x), the weights fixed for an
image, in one run: Owen values are linear in the score, so that is the sum of the class maps that one run's boxes
give.  (Runs of their own would split other boxes for each class and cost K times as much.)  Of any other attribution
the sum is taken class by class, at K times the cost of a map.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from impactx.explain.attribution import Attribution, Explanations, PartitionAttribution
from impactx.explain.scores import Score, chunks, open_images

BLOCK = 64  # images a forward where only their probabilities are wanted


@torch.no_grad()
def class_probabilities(score: Score, images: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """float64 (N, K): the probabilities that a model gives its classes; images: uint8 (N, H, W, C)."""
    found = []
    for part in chunks(len(images), BLOCK):
        x, _ = open_images(images[part], np.zeros(len(images[part])), device)
        found.append(score(x).double().softmax(1).cpu().numpy())
    return np.concatenate(found)


def explain_weighted(maker: Attribution, score: Score, images: np.ndarray, weights: np.ndarray, *,
                     device: torch.device | str = "cpu", memory_bytes: int = 2**29,
                     indices: np.ndarray | None = None) -> Explanations:
    """One map an image: the sum of its class maps with these weights, float64 (N, K).

    scores and base_values are weighted sums as well. The rest, and what is raised, is `Attribution.explain`'s.
    """
    how = {"device": device, "memory_bytes": memory_bytes, "indices": indices}
    if isinstance(maker, PartitionAttribution):
        return maker.explain(score, images, weights, **how)
    maps = np.zeros((len(images), images.shape[3], *images.shape[1:3]))
    scores, base = np.zeros(len(images)), np.zeros(len(images))
    for k in range(weights.shape[1]):
        found = maker.explain(score, images, np.full(len(images), k, np.int64), **how)
        maps += weights[:, k, None, None, None] * found.maps
        scores += weights[:, k] * found.scores
        base += weights[:, k] * found.base_values
    return Explanations(maps.astype(np.float32), scores, base)


def explain_by_own_probabilities(maker: Attribution, model: nn.Module, images: np.ndarray, *,
                                 device: torch.device | str = "cpu", memory_bytes: int = 2**29,
                                 indices: np.ndarray | None = None) -> Explanations:
    """WAE's maps: the classes weighted by the model's own probabilities of each image; no label is needed."""
    weights = class_probabilities(model, images, device)
    return explain_weighted(maker, model, images, weights, device=device, memory_bytes=memory_bytes, indices=indices)
