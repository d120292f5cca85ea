"""What a decoder is taught: each image's own map or, as controls, maps that know less.

Everything is fitted and drawn on the training part; the validation part is shuffled within itself,
so that no map crosses from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from impactx.datasets import Split

Maps = Literal["own", "shuffled", "shuffled_in_class", "mean", "class_mean"]


@dataclass(frozen=True)
class Rearranged:
    """Maps of other images, read when they are asked for.

    Attributes:
        base: float32 (M, C, H, W).
        source: int64 (N,): row i is base[source[i]].
    """

    base: np.ndarray
    source: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, C, H, W)."""
        return (len(self.source), *self.base.shape[1:])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        taken: np.ndarray = self.base[self.source[rows]]
        return taken


def targets_of(maps_taught: Maps, maps: np.ndarray, scale: float | np.ndarray, labels: np.ndarray,
               split: Split, seed: int) -> tuple[np.ndarray | Rearranged, float | np.ndarray]:
    """Return the maps that are taught, (N, C, H, W), and the factor(s) still to be applied.

    Args:
        maps_taught: "own": each image's; "shuffled": another image's of its part;
            "shuffled_in_class": another one's of its part and label (its own where there is no
            other); "mean", "class_mean": the mean of the training part's maps, or of its maps of
            the image's label, in scaled units, so that the scale stays the one that IMPACTX has.
        maps: float32 (N, C, H, W), each training image's own.
        scale: One factor, or one for each image (N,), see `explain.store.map_scale`.
        labels: int64 (N,).
        split: Training and validation part.
        seed: Of the shuffling.

    Raises:
        ValueError: A label has no training image for its mean.
    """
    if maps_taught == "own":
        return maps, scale
    if maps_taught in ("shuffled", "shuffled_in_class"):
        source = np.arange(len(labels))
        for number, part in enumerate((split.train, split.validation)):
            rng = np.random.default_rng([seed, number])
            groups = [part] if maps_taught == "shuffled" else [
                part[labels[part] == k] for k in np.unique(labels[part])]
            for group in groups:
                order = rng.permutation(group)
                source[order] = np.roll(order, 1)  # one cycle: nobody keeps their own
        return Rearranged(maps, source), scale if np.ndim(scale) == 0 else np.asarray(scale)[source]
    group_of = np.asarray(labels, np.int64)
    if maps_taught == "mean":
        group_of = np.zeros(len(labels), np.int64)
    return Rearranged(_means(maps, scale, group_of, split.train), group_of), 1.0


def _means(maps: np.ndarray, scale: float | np.ndarray, group_of: np.ndarray,
           training: np.ndarray) -> np.ndarray:
    """Return the mean of the scaled training maps of each group, float32 (groups, C, H, W)."""
    total = np.zeros((int(group_of.max()) + 1, *maps.shape[1:]))
    count = np.bincount(group_of[training], minlength=len(total))
    for start in range(0, len(training), 1024):  # the array may be larger than memory
        rows = training[start:start + 1024]
        factor = np.asarray(scale if np.ndim(scale) == 0 else np.asarray(scale)[rows], np.float64)
        factor = factor.reshape(-1, *[1] * (3 if factor.ndim else 0))
        np.add.at(total, group_of[rows], maps[rows] * factor)  # summed in float64
    used = np.unique(group_of)
    if (missing := used[count[used] == 0]).size:
        raise ValueError(f"maps = class_mean: label {missing[0]} has no image in the training part")
    return (total / np.maximum(count, 1)[:, None, None, None]).astype(np.float32)
