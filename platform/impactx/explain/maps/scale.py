"""The scale in which a decoder learns maps: factors that multiply them before stage 2."""

from __future__ import annotations

import numpy as np

from impactx.explain.maps.store import StoreError


def map_scale(maps: np.ndarray, training: np.ndarray, scale: str) -> np.ndarray | float:
    """Return the factor or factors for maps, fitted on the training part alone.

    Args:
        maps: float32 (N, C, H, W), in the attribution's own units; may be larger than memory.
        training: Indices of the training part, int64.
        scale: The setting `maps.scale`. "std": 1 / standard deviation of the training maps'
            values; "max_abs": each map's own factor, `largest_scale`; "raw": 1.

    Returns:
        A float for all maps, or for "max_abs" float32 (N,).

    Raises:
        StoreError: All training maps are constant ("std") or zeros ("max_abs").
    """
    if scale == "raw":
        return 1.0
    if scale == "std":
        # In blocks and in float64: the array may be larger than memory.
        total = square = 0.0
        for start in range(0, len(training), 1024):
            block = np.asarray(maps[training[start:start + 1024]], np.float64)
            total += block.sum()
            square += np.square(block).sum()
        count = len(training) * int(np.prod(maps.shape[1:]))
        variance = square / count - (total / count) ** 2
        if not variance > 0:
            raise StoreError("all training maps are constant: there is nothing to learn from them")
        return float(variance**-0.5)
    if not any(np.any(maps[i]) for i in training):
        raise StoreError("all training maps are zeros: there is nothing to learn from them")
    return largest_scale(maps)


def largest_scale(maps: np.ndarray) -> np.ndarray:
    """Return the factors of the scale "max_abs": 1 / each map's largest absolute value.

    A map of zeros, as of an image of one colour that a blur leaves as it is, has the factor 1: no
    factor changes it.

    Args:
        maps: float32 (N, C, H, W); may be larger than memory.

    Returns:
        float32 (N,).
    """
    # One by one: the maps may be larger than memory.
    largest = np.array([np.abs(one).max() for one in maps], np.float32)
    # Of a value below float32's normal ones, 1 / value may be above float32: such a map counts as
    # zeros.
    return 1 / np.where(largest < np.finfo(np.float32).tiny, np.float32(1), largest)
