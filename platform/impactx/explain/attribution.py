"""Attributions: the class that all of them extend, and what they return.

An attribution makes one map for each image: how much each pixel contributes to the score of a
class. A new one is a class with a name, its settings as fields, and the method `explain`; the
decorator makes it known to configurations, the command line and docs/SETTINGS.md:

    @attribution
    class InputTimesGradient(Attribution):
        method: Literal["input_times_gradient"] = "input_times_gradient"

        def explain(self, score, images, labels, *, device="cpu", memory_bytes=2**29, indices=None):
            ...

An attribution that explains the score of each image's class by forward and backward passes of the
whole model extends `BatchedAttribution` instead: it checks the model and its scores, chooses how
many images go through the model together, and asks only for `maps_of`.
"""

from __future__ import annotations

import abc
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field

from impactx.explain.errors import AttributionError, MissingPackage
from impactx.explain.masking import parse_masker
from impactx.explain.precision import forward_precision
from impactx.explain.scores import (
    ClassScores,
    Score,
    names_of,
    open_images,
    rows_that_fit,
    until_it_fits,
)
from impactx.settings.extensions import AttributionSettings, attribution

__all__ = ["Attribution", "AttributionError", "BatchedAttribution", "Explanations",
           "MissingPackage", "attribution"]


@dataclass(frozen=True)
class Explanations:
    """The maps of N images, and the scores between which they stand.

    Attributes:
        maps: float32 (N, C, H, W), of the images' own size, in the units of the score.
        scores: float64 (N,), the explained score of each image.
        base_values: float64 (N,), the explained score of each image's fully masked version or
            baseline; NaN where an attribution has no such thing.
        precision_error: For maps that were not made in float32: how far some of them are from
            float32's (`precision.map_error`). None for maps made in float32.
    """

    maps: np.ndarray
    scores: np.ndarray
    base_values: np.ndarray
    precision_error: float | None = None


class Attribution(AttributionSettings, abc.ABC):
    """A method that makes one map for each image; its fields are its settings.

    Attributes:
        additive: Whether each map sums to score - base value, and is checked to.
        requires: Import names of the optional packages that the method needs.
    """

    # A setting may have an alias, where its name is that of a method: `explain` is one.
    model_config = ConfigDict(serialize_by_alias=True)

    additive: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()

    @property
    def title(self) -> str:
        """The short name that the orders of maps and the report have for this attribution."""
        return self.method

    @property
    def maskers(self) -> tuple[str, ...]:
        """The maskers that stand in for hidden pixels: by default the setting `masker`, if any."""
        masker = getattr(self, "masker", None)
        return () if masker is None else (masker,)

    def described(self) -> dict[str, Any]:
        """Return as plain data all settings that the values of the maps depend on.

        They are part of the fingerprint of every store of such maps.
        """
        return self.model_dump(mode="json")

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """Return the cost of one map, in forward passes of one image; a gradient counts as three.

        Args:
            size: Height and width of the image in pixels; None where they are not known yet.

        Returns:
            The number of passes, at most; None where it is unknown or depends on an unknown size.
        """
        return None

    def weighted_evaluations(self, size: tuple[int, int] | None, num_classes: int) -> int | None:
        """Return the cost of one map of a weighted sum of classes (`explain_weighted`).

        Args:
            size: Height and width of the image in pixels; None where they are not known yet.
            num_classes: How many classes the model has.

        Returns:
            The number of forward passes, at most; None where `evaluations` gives None.
        """
        each = self.evaluations(size)
        return None if each is None else each * num_classes

    def check(self, channels: int, image_size: tuple[int, int]) -> None:
        """Check that the settings fit images of a shape.

        Args:
            channels: The images' channels.
            image_size: The images' height and width in pixels.

        Raises:
            ValueError: A setting does not fit such images; the message names it. (A masker's error
                is a `MaskerError`.)
        """
        for name in self.maskers:
            parse_masker(name).background(torch.zeros(1, channels, *image_size))

    def check_available(self) -> None:
        """Check that the packages that the method needs are installed, without importing them.

        Raises:
            MissingPackage: One is not; the message says what to install.
        """
        for package in self.requires:
            if importlib.util.find_spec(package) is None:
                raise MissingPackage(package, self.method)

    @abc.abstractmethod
    def explain(
        self, score: Score, images: np.ndarray, labels: np.ndarray, *,
        device: torch.device | str = "cpu", memory_bytes: int = 2**29,
        indices: np.ndarray | None = None,
    ) -> Explanations:
        """Explain the score of each image's class.

        A map depends on its image and index, and not on the images beside it (but for rounding).

        Args:
            score: A function or a module in eval mode that takes images, float32 (B, C, H, W) in
                [0, 1], and returns logits (B, K).
            images: uint8 (N, H, W, C).
            labels: int64 (N,) in [0, K), the class whose score is explained.
            device: Where `score` runs.
            memory_bytes: Working memory; it changes only the speed.
            indices: int64 (N,), the positions of the images in their data set, by which messages
                name them and random numbers are drawn; 0 to N-1 by default.

        Returns:
            One map for each image, in the order of the images.

        Raises:
            AttributionError: The model or an image cannot be explained; the message names it.
            MaskerError: A masker does not fit the images.
        """

    def explain_weighted(
        self, score: Score, images: np.ndarray, weights: np.ndarray, *,
        device: torch.device | str = "cpu", memory_bytes: int = 2**29,
        indices: np.ndarray | None = None,
    ) -> Explanations:
        """Explain a weighted sum of the scores of all classes: by default, add up the class maps.

        Args:
            score: See `explain`.
            images: uint8 (N, H, W, C).
            weights: Floating point (N, K), each image's weights of the classes.
            device: See `explain`.
            memory_bytes: See `explain`.
            indices: See `explain`.

        Returns:
            One map for each image; scores and base values are weighted sums as well.

        Raises:
            AttributionError: See `explain`.
            MaskerError: See `explain`.
        """
        maps = np.zeros((len(images), images.shape[3], *images.shape[1:3]))
        scores, base_values = np.zeros(len(images)), np.zeros(len(images))
        for k in range(weights.shape[1]):
            of_class = self.explain(score, images, np.full(len(images), k, np.int64), device=device,
                                    memory_bytes=memory_bytes, indices=indices)
            maps += weights[:, k, None, None, None] * of_class.maps
            scores += weights[:, k] * of_class.scores
            base_values += weights[:, k] * of_class.base_values
        return Explanations(maps.astype(np.float32), scores, base_values)


class BatchedAttribution(Attribution, abc.ABC):
    """An attribution of the score of each image's class, in float32 and in batches that fit memory.

    A subclass implements `maps_of`; the opening is the same for all of them: packages and settings
    are checked, then the model and its scores, and a batch that does not fit is halved.
    """

    explained_score: Literal["logit", "probability"] = Field(
        "logit", alias="explain", description="which score of the class is explained")

    @abc.abstractmethod
    def maps_of(self, scores: ClassScores, rows: int) -> Explanations:
        """Make the maps of the images that `scores` holds.

        Args:
            scores: The explained score as a function, with the images, their labels and names.
            rows: How many images go through the model together at most.

        Returns:
            One map for each image.

        Raises:
            AttributionError: The model or an image cannot be explained.
            torch.OutOfMemoryError: So many rows do not fit; the caller tries again with half.
        """

    @forward_precision("float32")
    def explain(
        self, score: Score, images: np.ndarray, labels: np.ndarray, *,
        device: torch.device | str = "cpu", memory_bytes: int = 2**29,
        indices: np.ndarray | None = None,
    ) -> Explanations:
        """See `Attribution.explain`."""
        self.check_available()
        pixels, classes = open_images(images, labels, device)
        self.check(pixels.shape[1], (pixels.shape[2], pixels.shape[3]))
        scores = ClassScores(score, self.explained_score, pixels, classes,
                             names_of(indices, len(pixels)))
        return until_it_fits(lambda rows: self.maps_of(scores, rows),
                             rows_that_fit(scores, memory_bytes))
