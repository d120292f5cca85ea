"""What an attribution is: something that makes one map an image, for its true class.

A new attribution is a settings class in `impactx.settings`, a class here or in a module of its own with
`explain`, and an entry in `build_attribution`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from impactx.explain.partition import partition_shap
from impactx.settings import AttributionSettings, PartitionSettings

Score = Callable[[Tensor], Tensor]


class AttributionError(ValueError):
    """A map cannot be made of this model and image; the message names the image and the reason."""


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
                memory_bytes: int = 2**29) -> Explanations:
        """Explain the score of each image's class.

        score: (B, C, H, W) float32 in [0, 1] -> logits (B, K); images: uint8 (N, H, W, C);
        labels: int64 (N,) in [0, K). Raises AttributionError or ValueError for what cannot be explained.
        """
        ...


class PartitionAttribution:
    """shap.PartitionExplainer's values (paper 4.2), by the batched engine."""

    additive = True

    def __init__(self, settings: PartitionSettings) -> None:
        self.settings = settings

    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29) -> Explanations:
        """See `Attribution.explain`."""
        s = self.settings
        explained = score if s.explain == "logit" else _probabilities(score)
        found = partition_shap(explained, _on_device(images, device), torch.from_numpy(labels), masker=s.masker,
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
    """The attribution that the settings name."""
    return PartitionAttribution(settings)
