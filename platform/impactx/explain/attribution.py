"""What an attribution is: something that makes one map an image, for its true class.

A new attribution is a settings class in `impactx.settings`, a class here or in a module of its own with
`explain`, and an entry in `build_attribution`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from impactx.explain.fast import fast_score
from impactx.explain.partition import AdditivityError, PartitionError, partition_shap
from impactx.explain.precision import forward_precision, map_error
from impactx.explain.scores import AttributionError, Score, names_of
from impactx.settings import AttributionSettings, PartitionSettings, Precision

__all__ = ["Attribution", "AttributionError", "Explanations", "PartitionAttribution", "Score", "build_attribution"]


COMPARED = 2  # images of each call that are explained in float32 as well, where that is not the precision


@dataclass(frozen=True)
class Explanations:
    """maps: float32 (N, C, H, W) at native size; scores, base_values: float64 (N,), the explained score
    of the image and of its fully masked version (NaN where an attribution has no such thing); precision_error: of
    maps that were not made in float32, how far some of them are from those that are (`precision.map_error`)."""

    maps: np.ndarray
    scores: np.ndarray
    base_values: np.ndarray
    precision_error: float | None = None


class Attribution(Protocol):
    """Makes maps. `additive`: each map sums to scores - base_values, and was checked to."""

    additive: bool

    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """Explain the score of each image's class.

        score: (B, C, H, W) float32 in [0, 1] -> logits (B, K), a module in eval mode or a function; images: uint8
        (N, H, W, C); labels: int64 (N,) in [0, K); indices: int64 (N,), the images' places in the data set, by which
        messages name them and random numbers are drawn (default: 0 ... N-1). A map depends on its image and index,
        not on the images beside it (but for rounding). memory_bytes: working memory, which changes only speed.
        Raises AttributionError for what cannot be explained, MaskerError for a masker that does not fit the images.
        """
        ...


class PartitionAttribution:
    """shap.PartitionExplainer's values (paper 4.2), by the batched engine.

    Instead of labels `explain` takes weights of all classes as well, float (N, K): what is explained is then the
    weighted sum of an image's scores.
    """

    additive = True

    def __init__(self, settings: PartitionSettings) -> None:
        self.settings = settings
        self._last: tuple[Score, tuple[int, ...], Score] | None = None

    def _fastest(self, score: Score, size: tuple[int, ...]) -> Score:
        """The explained score in its fastest form, made once for a model and (H, W, C): it takes a second."""
        if self._last is None or self._last[0] is not score or self._last[1] != size:
            height, width, channels = size
            # With a fixed context interactions are differences of four scores, and the frozen form's other rounding
            # would show: up to 1.8e-5 of a map's maximum (docs/LOG.md).
            if isinstance(score, nn.Module) and self.settings.fixed_context is None:
                probability = self.settings.explain == "probability"
                explained: Score = fast_score(nn.Sequential(score, nn.Softmax(1)).eval() if probability else score,
                                              (channels, height, width))
            else:
                explained = self._plain(score)
            self._last = score, size, explained
        return self._last[2]

    def _plain(self, score: Score) -> Score:
        """The explained score by the model as it is."""
        return (lambda images: score(images).softmax(1)) if self.settings.explain == "probability" else score

    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """See `Attribution.explain`."""
        try:
            how = device, memory_bytes, names_of(indices, len(images))
            found = self._explain(score, images, labels, self.settings.precision, *how)
            if self.settings.precision == "float32":
                return found
            exact = self._explain(score, images[:COMPARED], labels[:COMPARED], "float32", *how)
            return replace(found, precision_error=map_error(found.maps[:COMPARED], exact.maps))
        except (PartitionError, AdditivityError) as error:
            raise AttributionError(str(error)) from error

    def _explain(self, score: Score, images: np.ndarray, labels: np.ndarray, precision: Precision,
                 device: torch.device | str, memory_bytes: int, names: list[int]) -> Explanations:
        s = self.settings
        # The frozen form is float32's alone: its layouts are chosen when it is made.
        explained = self._fastest(score, images.shape[1:]) if precision != "bfloat16" else self._plain(score)
        classes = torch.from_numpy(np.array(labels))  # a copy: labels may be a read-only file
        with forward_precision(precision, device):
            found = partition_shap(explained, _on_device(images, device), classes, masker=s.masker,
                                   max_evals=s.max_evals, batch_size=s.batch_size, fixed_context=s.fixed_context,
                                   memory_limit_bytes=memory_bytes, names=names[:len(images)])
        return Explanations(np.ascontiguousarray(found.values[:, 0], dtype=np.float32),
                            np.asarray(found.scores[:, 0], np.float64),
                            np.asarray(found.base_values[:, 0], np.float64))


def _on_device(images: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.array(images)).to(device)  # a copy: the images may be a read-only file


def build_attribution(settings: AttributionSettings) -> Attribution:
    """The attribution that the settings name. Raises MissingPackage where it needs one that is not installed."""
    if isinstance(settings, PartitionSettings):
        return PartitionAttribution(settings)
    # Each in a module of its own, imported when it is asked for: shap and captum take seconds.
    if settings.method == "shap_partition":
        from impactx.explain.stock_shap import ShapPartitionAttribution

        return ShapPartitionAttribution(settings)
    if settings.method in ("integrated_gradients", "gradient_shap"):
        from impactx.explain.gradients import (
            GradientShapAttribution,
            IntegratedGradientsAttribution,
        )

        return (IntegratedGradientsAttribution(settings) if settings.method == "integrated_gradients"
                else GradientShapAttribution(settings))
    if settings.method == "occlusion":
        from impactx.explain.occlusion import OcclusionAttribution

        return OcclusionAttribution(settings)
    from impactx.explain.grad_cam import GradCamAttribution

    return GradCamAttribution(settings)
