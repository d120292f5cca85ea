"""Occlusion, by captum: how much the score falls where a square is hidden.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014, section 2.1. A
pixel's value is the mean of f(image) - f(image with the square hidden) over the squares that hold
it. Squares hide all channels together, so the channels of a map are equal. There is no base value,
and nothing adds up.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from impactx.explain.attribution import (
    AttributionError,
    BatchedAttribution,
    Explanations,
    attribution,
)
from impactx.explain.masking import parse_masker
from impactx.explain.scores import ClassScores, chunks
from impactx.settings.base import MaskerName


@attribution
class Occlusion(BatchedAttribution):
    """Occlusion (Zeiler and Fergus 2014), by captum: the mean loss of score by hidden squares."""

    method: Literal["occlusion"] = "occlusion"
    masker: MaskerName = Field("0.5", description=(
        "what stands in the square: grey, as the authors have it, another colour, or blur(k,k)"))
    window: int = Field(8, ge=1, description=(
        "side of the square in pixels; all channels are hidden together"))
    stride: int = Field(4, ge=1, description="pixels between two squares; at most window")

    requires: ClassVar[tuple[str, ...]] = ("captum",)

    @model_validator(mode="after")
    def _no_gaps(self) -> Occlusion:
        if self.stride > self.window:
            raise ValueError(f"stride {self.stride} is above window {self.window}: pixels between "
                             "the squares would never be hidden")
        return self

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """See `Attribution.evaluations`: one for each square, and two for the image itself."""
        if size is None:
            return None
        return self._squares(size) + 2

    def check(self, channels: int, image_size: tuple[int, int]) -> None:
        """See `Attribution.check`.

        Raises:
            AttributionError: The window is larger than the images.
        """
        super().check(channels, image_size)
        if self.window > min(image_size):
            raise AttributionError(f"window = {self.window} is larger than the images "
                                   f"({image_size[0]}x{image_size[1]})")

    @torch.no_grad()
    def maps_of(self, scores: ClassScores, rows: int) -> Explanations:
        """See `BatchedAttribution.maps_of`."""
        from captum import attr

        x, y = scores.images, scores.labels
        channels, height, width = x.shape[1:]
        of_images = scores.of_class(x, rows)
        hidden = parse_masker(self.masker).background(x)
        squares = self._squares((height, width)) + 2
        # Several images with all their squares in one forward, or one image with some of them.
        together = max(1, rows // squares)
        at_once = min(squares, max(1, rows // together))
        maps = [attr.Occlusion(scores).attribute(
            x[part], sliding_window_shapes=(channels, self.window, self.window),
            strides=(channels, self.stride, self.stride), baselines=hidden[part], target=y[part],
            perturbations_per_eval=at_once) for part in chunks(len(x), together)]
        return Explanations(scores.finite(torch.cat(maps)), of_images, np.full(len(x), np.nan))

    def _squares(self, size: tuple[int, int]) -> int:
        return math.prod(
            1 + math.ceil(max(side - self.window, 0) / self.stride) for side in size)
