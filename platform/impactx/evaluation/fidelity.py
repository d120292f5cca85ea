"""How well maps predict the maps of an explainer: a decoder's against SHAP's, beside predictors that know less.

A number here means something only beside the mean training map and the class-mean maps as predictors (what is there to
gain by looking at the image?), and beside a decoder with random weights (Adebayo et al., "Sanity checks for saliency
maps", 2018).
"""

from __future__ import annotations

import copy

import numpy as np
from torch import nn

from impactx.models.seeding import seeded

TOP_SHARE = 0.1


def agreement(maps: np.ndarray, target: np.ndarray, top_share: float = TOP_SHARE) -> dict[str, np.ndarray]:
    """Image by image, float64 (N,) each, of maps and target (N, C, H, W) in the same units.

    mse: mean squared difference; correlation: Pearson's, over all values of a map, NaN where one of the two is
    constant; overlap: the share of the `top_share` most relevant pixels (channels summed, at least 1 pixel; of equal
    ones the first) that the two have in common. Chance gives an overlap of about top_share.
    """
    a, b = (np.asarray(m, np.float64).reshape(len(m), -1) for m in (maps, target))
    x, y = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    correlation = np.full(len(a), np.nan)
    # What is left of a constant map is rounding, relative to its values.
    varies = (np.abs(x).max(1) > 1e-12 * np.abs(a).max(1)) & (np.abs(y).max(1) > 1e-12 * np.abs(b).max(1))
    np.divide((x * y).sum(1), size, out=correlation, where=varies & (size > 0))
    return {"mse": ((a - b) ** 2).mean(1), "correlation": correlation, "overlap": _overlap(maps, target, top_share)}


def _overlap(maps: np.ndarray, target: np.ndarray, top_share: float) -> np.ndarray:
    pixels = maps.shape[2] * maps.shape[3]
    count = max(1, round(top_share * pixels))
    found = []
    for m, t in zip(maps, target, strict=True):
        tops = [np.argsort(-np.asarray(v, np.float64).sum(0).ravel(), kind="stable")[:count] for v in (m, t)]
        found.append(len(np.intersect1d(*tops, assume_unique=True)) / count)
    return np.array(found)


def mean_maps(maps: np.ndarray, labels: np.ndarray, indices: np.ndarray, num_classes: int,
              scale: float | np.ndarray = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the scaled maps (C, H, W) and that of each class (num_classes, C, H, W), float64.

    maps: (N, C, H, W), may be memory-mapped; indices: of those that count, every class among them; scale: one factor,
    or one for each of the N maps.
    """
    sums, counts = np.zeros((num_classes, *maps.shape[1:])), np.zeros(num_classes)
    for start in range(0, len(indices), 1024):
        chosen = indices[start:start + 1024]
        factor = np.asarray(scale)[chosen].reshape(-1, 1, 1, 1) if np.ndim(scale) else scale
        block = np.asarray(maps[chosen], np.float64) * factor
        for label in np.unique(labels[chosen]):
            members = labels[chosen] == label
            sums[label] += block[members].sum(0)
            counts[label] += members.sum()
    return sums.sum(0) / counts.sum(), sums / counts.reshape(-1, 1, 1, 1)


def randomised(model: nn.Module, part: str, seed: int) -> nn.Module:
    """A copy of the model, which is on the CPU, with random weights from `seed` in its submodule `part`."""
    other = copy.deepcopy(model)
    with seeded(seed, f"randomised {part}"):
        for module in other.get_submodule(part).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return other.eval()
