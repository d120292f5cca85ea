"""A data source of one's own: images of two shapes, drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from impactx.datasets.sources.base import Part, Source
from impactx.settings.extensions import source


@source
class Shapes(Source):
    """Squares and crosses of random colours on black, 16x16 pixels."""

    kind: Literal["shapes"] = "shapes"
    count: int = 60
    seed: int = 0

    def describe(self) -> str:
        """Return in one line which data are used."""
        return f"{self.count} drawn squares and crosses (seed {self.seed})"

    def identity(self) -> Any:
        """Return every setting on which the images depend."""
        return [self.count, self.seed]

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes in the order of the labels."""
        return ("square", "cross")

    def labels(self, part: Part) -> np.ndarray:
        """Return the labels, int64 of shape (count,): squares and crosses in turn."""
        return np.arange(self.count) % 2

    def images(self, part: Part, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Return images as arrays, uint8 of shape (16, 16, 3)."""
        for row in rows:
            image = np.zeros((16, 16, 3), np.uint8)
            colour = np.random.default_rng([self.seed, row]).integers(64, 256, 3)
            for box in (np.s_[4:12, 4:12],) if row % 2 == 0 else (np.s_[7:9, 2:14], np.s_[2:14, 7:9]):
                image[box] = colour
            yield image
