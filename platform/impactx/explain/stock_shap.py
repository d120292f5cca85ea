"""The shap package's own PartitionExplainer (paper 4.2): the reference for `partition`, one image at a time."""

from __future__ import annotations

import numpy as np
import torch

from impactx.explain.attribution import Explanations
from impactx.explain.masking import Blur, parse_masker
from impactx.explain.partition import AdditivityError, check_additivity
from impactx.explain.precision import forward_precision
from impactx.explain.scores import (
    AttributionError,
    ClassScores,
    Score,
    missing_package,
    names_of,
    open_images,
    rows_that_fit,
    until_it_fits,
)
from impactx.settings import ShapPartitionSettings


class ShapPartitionAttribution:
    """shap.PartitionExplainer for each image's class. Additive, and checked to be."""

    additive = True

    def __init__(self, settings: ShapPartitionSettings) -> None:
        self.settings = settings
        try:
            import shap
        except ImportError as error:
            raise missing_package("shap", settings.method) from error
        self.shap = shap

    @forward_precision("float32")
    @torch.no_grad()
    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """See `Attribution.explain`. Raises AdditivityError, naming the image, where a map does not add up."""
        x, y = open_images(images, labels, device)
        scores = ClassScores(score, self.settings.explain, x, y, names_of(indices, len(x)))
        return until_it_fits(lambda rows: self._maps(scores, rows), rows_that_fit(scores, memory_bytes))

    def _maps(self, scores: ClassScores, rows: int) -> Explanations:
        s, x, y = self.settings, scores.images, scores.labels
        found = scores.of_class(x, rows)  # names what cannot be explained before the first of the long steps
        masker = parse_masker(s.masker)
        hidden = masker.background(x)
        maps, base = np.empty(tuple(x.shape), np.float32), np.empty(len(x))

        def values(pixels: np.ndarray) -> np.ndarray:
            stack = torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).permute(0, 3, 1, 2).contiguous()
            return np.concatenate([scores(part).cpu().numpy() for part in stack.to(x.device).split(rows)])

        numbers = np.random.get_state()  # shap seeds NumPy's global generator, which is not ours to change
        for i, name in enumerate(scores.names):
            pixels = np.ascontiguousarray(x[i].permute(1, 2, 0).cpu().numpy())
            # Built anew for each image: shap caches the blurred one by id(), which another image may get.
            mask = f"blur({masker.width},{masker.height})" if isinstance(masker, Blur) else np.ascontiguousarray(
                hidden[i].permute(1, 2, 0).cpu().numpy())
            explainer = self.shap.PartitionExplainer(values, self.shap.maskers.Image(mask, pixels.shape))
            made = explainer(pixels[None], max_evals=s.max_evals, batch_size=s.batch_size, outputs=[int(y[i])],
                             fixed_context=s.fixed_context, silent=True)
            maps[i] = np.moveaxis(made.values[0, ..., 0], 2, 0)
            base[i] = float(np.ravel(made.base_values)[0])
            # f(image) as shap had it, alone in a forward: among others it is rounded another way (by up to 131 float32
            # eps of the score, in the networks tried), which is more than a map of low contrast may miss.
            found[i] = values(pixels[None])[0, int(y[i])]
            if not np.isfinite(maps[i]).all():
                raise AttributionError(f"the map of image {name} is not finite: the model gives such scores to masked "
                                       "versions of it")
            try:
                check_additivity(maps[None, None, i], found[None, None, i], base[None, None, i], names=[name])
            except AdditivityError as error:
                raise AttributionError(str(error)) from error
        np.random.set_state(numbers)
        return Explanations(maps, found, base)
