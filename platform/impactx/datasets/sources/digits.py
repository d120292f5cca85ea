"""scikit-learn's embedded digits: 1797 grey images of 8x8, upscaled; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from impactx.datasets.decoding import Raw, decode
from impactx.datasets.sources.base import Part, Source

SIZE = 32


class DigitsSource(Source):
    """The 16 grey levels are spread over 0..255 and upscaled (bilinear) to SIZE, or to `size` at once."""

    has_test = False

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self._size = size or SIZE

    def describe(self) -> str:
        return f"scikit-learn's embedded digits (1797 images of 8x8, upscaled to {self._size}x{self._size})"

    def identity(self) -> Any:
        return ["digits", version("scikit-learn"), self._size]

    @cached_property
    def _bunch(self) -> Any:
        from sklearn.datasets import load_digits

        return load_digits()

    def class_names(self) -> tuple[str, ...]:
        return tuple(str(digit) for digit in range(10))

    def labels(self, part: Part) -> np.ndarray:
        return self._bunch.target.astype(np.int64)

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        for row in rows:
            grey = np.rint(self._bunch.images[row] * (255 / 16)).astype(np.uint8)
            yield decode(np.repeat(grey[:, :, None], 3, axis=2), self._size)[0]

    def where(self, part: Part, row: int) -> str:
        return f"digit {row}"
