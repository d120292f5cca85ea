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
    """The classifier A: x (B, 3, H, W), float in [0, 1] at native size -> logits (B, K).

    Args:
        preprocess: The model's own resize and normalisation.
        trunk: The backbone, preprocessed images -> (B, trunk features).
        head: The fully connected end, (B, trunk features) -> (B, K).
    """

    def __init__(self, preprocess: Preprocess, trunk: nn.Module, head: Head) -> None:
        super().__init__()
        self.preprocess, self.trunk, self.head = preprocess, trunk, head

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.head.last.out_features

    @property
    def num_features(self) -> int:
        """The number F of penultimate features."""
        return self.head.last.in_features

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width) in pixels."""
        return self.preprocess.image_size

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K)."""
        logits: Tensor = self.head(self.trunk(self.preprocess(x)))
        return logits

    def classify(self, x: Tensor) -> Tensor:
        """Return the same as `forward`."""
        logits: Tensor = self(x)
        return logits

    def penultimate(self, x: Tensor) -> Tensor:
        """Return the input of the last linear layer, (B, F).

        F is 84 for LeNet-5; else these are timm's pooled features.
        """
        features: Tensor = self.head.hidden(self.trunk(self.preprocess(x)))
        return features


def build_trunk(settings: ModelSettings, size: tuple[int, int], *, seed: int,
                load_weights: bool = True) -> nn.Module:
    """Build the feature extractor, (B, 3, *size) -> (B, F), random from `seed` or pre-trained.

    Args:
        settings: The architecture and where its weights come from.
        size: Height and width of the preprocessed images.
        seed: Of the random weights.
        load_weights: False leaves the random start (a checkpoint's tensors come next), and asks no
            hub.

    Raises:
        UnknownArchitecture: There is no such architecture.
        WeightsError: The hub is out of reach, or a file does not fit.
        ValueError: The architecture cannot take such a size.
    """
    hub = load_weights and settings.weights == "hub"
    with seeded(seed, "trunk"):
        if settings.architecture == "lenet5":
            trunk: nn.Module = lenet5.LeNet5Trunk(size)
            head_names: tuple[str, ...] = lenet5.HEAD_NAMES
        else:
            trunk, head_names = backbones.timm_trunk(settings.architecture, pretrained=hub)
    if load_weights and settings.weights not in ("hub", "random"):
        report = load_trunk_file(trunk, settings.weights, settings.weights_match,
                                 model_name=settings.architecture, head_names=head_names,
                                 sha256=settings.weights_sha256)
        log.info("%s", report)
    return trunk


def build_classifier(settings: ModelSettings, num_classes: int, image_size: tuple[int, int], *,
                     seed: int, load_weights: bool = True) -> Classifier:
    """Build a classifier on the CPU.

    Equal arguments give equal weights; the global random generators stay as they are. The head
    always starts random, the trunk as settings.weights says.

    Args:
        settings: The architecture and where its weights come from.
        num_classes: Number of classes K, at least 2.
        image_size: Native (height, width) in pixels.
        seed: Of the random weights.
        load_weights: See `build_trunk`, whose errors are raised as well.

    Raises:
        ValueError: There are fewer than 2 classes.
    """
    if num_classes < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {num_classes}")
    height, width = (int(side) for side in image_size)
    side = settings.input_size
    size = (height, width) if side is None else (side, side)
    trunk = build_trunk(settings, size, seed=seed, load_weights=load_weights)
    num_features = backbones.count_features(trunk, size, settings.architecture)
    is_lenet = settings.architecture == "lenet5"
    mean, std = ((lenet5.MEAN, lenet5.STD) if is_lenet
                 else backbones.normalisation(settings.architecture))
    preprocess = Preprocess((height, width), size, settings.mean or mean, settings.std or std)
    with seeded(seed, "head"):
        head = (lenet5.lenet5_head if is_lenet else linear_head)(num_features, num_classes)
    return Classifier(preprocess, trunk, head)
