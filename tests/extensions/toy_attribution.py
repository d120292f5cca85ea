"""An attribution outside the package: the gradient of the score, times the image.

Simonyan, Vedaldi and Zisserman 2013 (arXiv 1312.6034) look at the gradient's absolute values; times
the image it is the first term of the score's Taylor series around a black image.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from impactx.explain.attribution import BatchedAttribution, Explanations, attribution
from impactx.explain.scores import ClassScores, chunks


@attribution
class InputTimesGradient(BatchedAttribution):
    """The gradient of the class's score with respect to the image, times the image."""

    method: Literal["input_times_gradient"] = "input_times_gradient"
    absolute: bool = Field(False, description="true: maps without a sign")

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """One gradient, and the score of the image itself."""
        return 4

    def maps_of(self, scores: ClassScores, rows: int) -> Explanations:
        """Make the maps, `rows` images at a time."""
        maps = []
        for part in chunks(len(scores.images), rows):
            image, label = scores.images[part].clone().requires_grad_(), scores.labels[part]
            of_class = scores(image).gather(1, label[:, None]).sum()
            product = image.detach() * torch.autograd.grad(of_class, image)[0]
            maps.append(product.abs() if self.absolute else product)
        return Explanations(scores.finite(torch.cat(maps)), scores.of_class(scores.images, rows),
                            np.full(len(scores.images), np.nan))
