"""What an attribution is: something that makes one map an image, for its true class.

A new attribution is a settings class in `impactx.settings`, a class here or in a module of its own with
`explain`, and an entry in `build_attribution`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from impactx.explain.fast import fast_score
from impactx.explain.partition import AdditivityError, PartitionError, partition_shap
from impactx.explain.scores import AttributionError, Score
from impactx.settings import AttributionSettings, PartitionSettings

__all__ = ["Attribution", "AttributionError", "Explanations", "PartitionAttribution", "Score", "build_attribution"]


@dataclass(frozen=True)
class Explanations:
    """maps: float32 (N, C, H, W) at native size; scores, base_values: float64 (N,), the explained score
    of the image and of its fully masked version (NaN where an attribution has no such thing)."""

    maps: np.ndarray
    scores: np.ndarray
    base_values: np.ndarray


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
    """shap.PartitionExplainer's values (paper 4.2), by the batched engine."""

    additive = True

    def __init__(self, settings: PartitionSettings) -> None:
        self.settings = settings
        self._last: tuple[Score, tuple[int, ...], Score] | None = None

    def _fastest(self, score: Score, size: tuple[int, ...]) -> Score:
        """The explained score in its fastest form, made once for a model and (H, W, C): it takes a second."""
        if self._last is None or self._last[0] is not score or self._last[1] != size:
            height, width, channels = size
            probability = self.settings.explain == "probability"
            # With a fixed context interactions are differences of four scores, and the frozen form's other rounding
            # would show: up to 1.8e-5 of a map's maximum (docs/LOG.md).
            if isinstance(score, nn.Module) and self.settings.fixed_context is None:
                explained: Score = fast_score(nn.Sequential(score, nn.Softmax(1)).eval() if probability else score,
                                              (channels, height, width))
            else:
                explained = _probabilities(score) if probability else score
            self._last = score, size, explained
        return self._last[2]

    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """See `Attribution.explain`."""
        try:
            return self._explain(score, images, labels, device, memory_bytes)
        except (PartitionError, AdditivityError) as error:
            first = 0 if indices is None or not len(indices) else int(indices[0])
            counted = f" (images counted from image {first} of the data set)" if first else ""
            raise AttributionError(f"{error}{counted}") from error

    def _explain(self, score: Score, images: np.ndarray, labels: np.ndarray, device: torch.device | str,
                 memory_bytes: int) -> Explanations:
        s = self.settings
        fastest = self._fastest(score, images.shape[1:])
        classes = torch.from_numpy(np.array(labels))  # a copy: labels may be a read-only file
        found = partition_shap(fastest, _on_device(images, device), classes, masker=s.masker,
                               max_evals=s.max_evals, batch_size=s.batch_size, fixed_context=s.fixed_context,
                               memory_limit_bytes=memory_bytes)
        return Explanations(np.ascontiguousarray(found.values[:, 0], dtype=np.float32),
                            np.asarray(found.scores[:, 0], np.float64),
                            np.asarray(found.base_values[:, 0], np.float64))


def _probabilities(score: Score) -> Score:
    return lambda images: score(images).softmax(1)


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
        from impactx.explain.gradients import GradientShapAttribution, IntegratedGradientsAttribution

        return (IntegratedGradientsAttribution(settings) if settings.method == "integrated_gradients"
                else GradientShapAttribution(settings))
    if settings.method == "occlusion":
        from impactx.explain.occlusion import OcclusionAttribution

        return OcclusionAttribution(settings)
    from impactx.explain.grad_cam import GradCamAttribution

    return GradCamAttribution(settings)
