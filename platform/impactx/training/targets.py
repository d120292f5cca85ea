"""What a decoder is taught: each image's own map, or, as controls, maps that know less (DESIGN section 8).

Everything is fitted and drawn on the training part; the validation part is shuffled within itself, so that no map
crosses from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from impactx.datasets import Split

Maps = Literal["own", "shuffled", "shuffled_in_class", "mean", "class_mean"]


@dataclass(frozen=True)
class Rearranged:
    """Row i is base[source[i]]: maps of other images, read when they are asked for. source: int64 (N,)."""

    base: np.ndarray
    source: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self.source), *self.base.shape[1:])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.base[self.source[rows]]


def targets_of(how: Maps, maps: np.ndarray, scale: float | np.ndarray, labels: np.ndarray, split: Split, seed: int
               ) -> tuple[np.ndarray | Rearranged, float | np.ndarray]:
    """The maps that are taught, (N, C, H, W), and the factor(s) by which they are still to be multiplied.

    maps: float32 (N, C, H, W); scale: one factor, or one an image (`map_scale`); labels: int64 (N,).
    shuffled: every image of a part gets the map of another image of that part; shuffled_in_class: of another one of
    its label (its own where there is no other).  mean, class_mean: the mean of the training part's maps, or of its
    maps of the image's label, in scaled units: the scale stays the one that IMPACTX has.
    Raises ValueError where a label has no training image for its mean.
    """
    if how == "own":
        return maps, scale
    if how in ("shuffled", "shuffled_in_class"):
        source = np.arange(len(labels))
        for number, part in enumerate((split.train, split.validation)):
            rng = np.random.default_rng([seed, number])
            groups = [part] if how == "shuffled" else [part[labels[part] == k] for k in np.unique(labels[part])]
            for group in groups:
                order = rng.permutation(group)
                source[order] = np.roll(order, 1)  # one cycle: nobody keeps their own
        return Rearranged(maps, source), scale if np.ndim(scale) == 0 else np.asarray(scale)[source]
    group_of = np.zeros(len(labels), np.int64) if how == "mean" else np.asarray(labels, np.int64)
    return Rearranged(_means(maps, scale, group_of, split.train), group_of), 1.0


def _means(maps: np.ndarray, scale: float | np.ndarray, group_of: np.ndarray, training: np.ndarray) -> np.ndarray:
    """float32 (groups, C, H, W): the mean of the scaled training maps of each group, summed in float64."""
    total = np.zeros((int(group_of.max()) + 1, *maps.shape[1:]))
    count = np.bincount(group_of[training], minlength=len(total))
    for start in range(0, len(training), 1024):  # the array may be larger than memory
        rows = training[start:start + 1024]
        factor = np.asarray(scale if np.ndim(scale) == 0 else np.asarray(scale)[rows], np.float64)
        np.add.at(total, group_of[rows], maps[rows] * factor.reshape(-1, *[1] * (3 if factor.ndim else 0)))
    used = np.unique(group_of)
    if (missing := used[count[used] == 0]).size:
        raise ValueError(f"maps = class_mean: label {missing[0]} has no image in the training part")
    return (total / np.maximum(count, 1)[:, None, None, None]).astype(np.float32)
