"""scikit-learn's embedded digits, for trials without any download."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from pydantic import PrivateAttr

from impactx.datasets.decoding import Raw, decode
from impactx.datasets.sources.base import Part, Source, SourceFinder
from impactx.settings.extensions import source

SIZE = 32  # pixels, where image_size does not say otherwise


@source
class Digits(Source):
    """scikit-learn's 1797 grey digits of 8x8 pixels, upscaled to 32x32 or to image_size."""

    kind: Literal["digits"] = "digits"
    _bunch: Any = PrivateAttr(None)

    def describe(self) -> str:
        """Return in one line which data are used."""
        return ("scikit-learn's embedded digits (1797 images of 8x8, upscaled to "
                f"{self._size}x{self._size})")

    def identity(self) -> Any:
        """Return the library's version and the size of the images."""
        return ["digits", version("scikit-learn"), self._size]

    def remote_folders(self, name: str) -> list[tuple[str, SourceFinder]]:
        """Return nothing: the library holds the images."""
        return []

    def class_names(self) -> tuple[str, ...]:
        """Return the ten digits."""
        return tuple(str(digit) for digit in range(10))

    def labels(self, part: Part) -> np.ndarray:
        """Return the labels, int64 of shape (1797,)."""
        return np.asarray(self._digits().target, dtype=np.int64)

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        """Return images whose 16 grey levels are spread over 0..255, upscaled bilinearly."""
        for row in rows:
            grey = np.rint(self._digits().images[row] * (255 / 16)).astype(np.uint8)
            yield decode(np.repeat(grey[:, :, None], 3, axis=2), self._size)[0]

    def where(self, part: Part, row: int) -> str:
        """Return the number of a digit."""
        return f"digit {row}"

    @property
    def _size(self) -> int:
        return self.location.image_size or SIZE

    def _digits(self) -> Any:
        if self._bunch is None:
            from sklearn.datasets import load_digits

            self._bunch = load_digits()
        return self._bunch
