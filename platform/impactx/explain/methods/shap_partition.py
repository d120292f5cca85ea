"""The shap package's own PartitionExplainer (paper 4.2), one image at a time.

It is the reference that `partition` is compared with, and four and more times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from impactx.explain.attribution import (
    AttributionError,
    BatchedAttribution,
    Explanations,
    attribution,
)
from impactx.explain.masking import Blur, parse_masker
from impactx.explain.partition.engine import AdditivityError, check_additivity
from impactx.explain.partition.settings import PartitionValues
from impactx.explain.scores import ClassScores


@attribution
class ShapPartition(PartitionValues, BatchedAttribution):
    """SHAP's partition explainer by the shap package itself, one image at a time: the reference.

    It runs on a CPU or a GPU, four and more times slower than `partition`.
    """

    method: Literal["shap_partition"] = "shap_partition"

    requires: ClassVar[tuple[str, ...]] = ("shap", "cv2")

    @torch.no_grad()
    def maps_of(self, scores: ClassScores, rows: int) -> Explanations:
        """See `BatchedAttribution.maps_of`.

        Raises:
            AttributionError: A map is not finite, or does not add up; the message names the image.
        """
        x, y = scores.images, scores.labels
        # This names what cannot be explained before the first of the long steps.
        of_images = scores.of_class(x, rows)
        hidden = parse_masker(self.masker).background(x)
        maps, base_values = np.empty(tuple(x.shape), np.float32), np.empty(len(x))

        def values(pixels: np.ndarray) -> np.ndarray:
            stack = torch.from_numpy(np.ascontiguousarray(pixels, np.float32))
            stack = stack.permute(0, 3, 1, 2).contiguous()
            return np.concatenate([scores(part).cpu().numpy()
                                   for part in torch.split(stack.to(x.device), rows)])

        with _numpys_random_state_kept():
            for i, name in enumerate(scores.names):
                pixels, label = _channels_last(x[i]), int(y[i])
                explanation = self._explanation(values, pixels, _channels_last(hidden[i]), label)
                maps[i] = np.moveaxis(explanation.values[0, ..., 0], 2, 0)
                base_values[i] = float(np.ravel(explanation.base_values)[0])
                # f(image) as shap had it, alone in a forward: among others it is rounded another
                # way (by up to 131 float32 eps of the score, in the networks tried), which is more
                # than a map of low contrast may miss.
                of_images[i] = values(pixels[None])[0, label]
                _check(maps[i], of_images[i], base_values[i], name)
        return Explanations(maps, of_images, base_values)

    def _explanation(
        self, values: Any, pixels: np.ndarray, hidden: np.ndarray, label: int
    ) -> Any:
        import shap

        masker = parse_masker(self.masker)
        # Built anew for each image: shap caches the blurred one by id(), which another image may
        # get.
        mask = f"blur({masker.width},{masker.height})" if isinstance(masker, Blur) else hidden
        explainer = shap.PartitionExplainer(values, shap.maskers.Image(mask, pixels.shape))
        return explainer(pixels[None], max_evals=self.max_evals, batch_size=self.batch_size,
                         outputs=[label], fixed_context=self.fixed_context, silent=True)


def _channels_last(image: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _check(values: np.ndarray, score: float, base_value: float, name: int) -> None:
    if not np.isfinite(values).all():
        raise AttributionError(f"the map of image {name} is not finite: the model gives such "
                               "scores to masked versions of it")
    try:
        check_additivity(values[None, None], np.array([[score]]), np.array([[base_value]]),
                         names=[name])
    except AdditivityError as error:
        raise AttributionError(str(error)) from error


@contextmanager
def _numpys_random_state_kept() -> Iterator[None]:
    """Restore NumPy's global generator after the block: shap seeds it, and it is not ours."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
