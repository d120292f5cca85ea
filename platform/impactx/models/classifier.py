"""The classifier A of the paper: preprocessing, trunk, head (paper 3.1, 4.3)."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from impactx.models import backbones, lenet5
from impactx.models.head import Head, linear_head
from impactx.models.preprocess import Preprocess
from impactx.models.seeding import seeded
from impactx.models.weights import load_trunk_file
from impactx.settings import ModelSettings

log = logging.getLogger(__name__)


class Classifier(nn.Module):
    """A of the paper.  x (B, 3, H, W), float, values in [0, 1], native size -> logits (B, K).

    preprocess: the model's own resize and normalisation; trunk: preprocessed images -> (B, trunk features);
    head: (B, trunk features) -> (B, K).  num_features is F, the number of penultimate features.
    """

    def __init__(self, preprocess: Preprocess, trunk: nn.Module, head: Head) -> None:
        super().__init__()
        self.preprocess, self.trunk, self.head = preprocess, trunk, head

    @property
    def num_classes(self) -> int:
        return self.head.last.out_features

    @property
    def num_features(self) -> int:
        return self.head.last.in_features

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width)."""
        return self.preprocess.image_size

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.preprocess(x)))

    def classify(self, x: Tensor) -> Tensor:
        """The same as forward."""
        return self(x)

    def penultimate(self, x: Tensor) -> Tensor:
        """The input of the last linear layer, (B, F): F = 84 for LeNet-5, timm's pooled features else."""
        return self.head.hidden(self.trunk(self.preprocess(x)))

    def logits_and_penultimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, (B, K) and (B, F), by one pass."""
        features = self.penultimate(x)
        return self.head.last(features), features


def build_trunk(settings: ModelSettings, size: tuple[int, int], *, seed: int,
                load_weights: bool = True) -> nn.Module:
    """The feature extractor for preprocessed images of `size`, random from `seed` or pre-trained.

    (B, 3, *size) -> (B, F); `backbones.count_features` tells F.
    load_weights=False leaves the random start (a checkpoint's tensors come next), and asks no hub.
    Raises UnknownArchitecture, WeightsError (a hub out of reach, a file that does not fit), ValueError (a
    size that the architecture cannot take).
    """
    hub = load_weights and settings.weights == "hub"
    with seeded(seed, "trunk"):
        if settings.architecture == "lenet5":
            trunk, head_names = lenet5.LeNet5Trunk(size), lenet5.HEAD_NAMES
        else:
            trunk, head_names = backbones.timm_trunk(settings.architecture, pretrained=hub)
    if load_weights and settings.weights not in ("hub", "random"):
        report = load_trunk_file(trunk, settings.weights, settings.weights_match,
                                 model_name=settings.architecture, head_names=head_names)
        log.info("%s", report)
    return trunk


def build_classifier(settings: ModelSettings, num_classes: int, image_size: tuple[int, int], *, seed: int,
                     load_weights: bool = True) -> Classifier:
    """A classifier for `num_classes` classes of images of native `image_size` (height, width), on the CPU.

    Equal arguments give equal weights; the global random generators stay as they are.  The head always starts
    random; the trunk as settings.weights says.  Raises ValueError for fewer than 2 classes and whatever
    `build_trunk` raises.
    """
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {num_classes}")
    height, width = (int(side) for side in image_size)
    size = (height, width) if settings.input_size is None else (settings.input_size, settings.input_size)
    trunk = build_trunk(settings, size, seed=seed, load_weights=load_weights)
    num_features = backbones.count_features(trunk, size, settings.architecture)
    is_lenet = settings.architecture == "lenet5"
    mean, std = (lenet5.MEAN, lenet5.STD) if is_lenet else backbones.normalisation(settings.architecture)
    preprocess = Preprocess((height, width), size, settings.mean or mean, settings.std or std)
    with seeded(seed, "head"):
        head = (lenet5.lenet5_head if is_lenet else linear_head)(num_features, num_classes)
    return Classifier(preprocess, trunk, head)
