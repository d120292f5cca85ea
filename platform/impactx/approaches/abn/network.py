"""The network of ABN: a backbone with an attention branch before its last stage.

The backbone is cut before its last stage that halves the resolution. From the features F there, an
attention branch makes class scores of its own and a map M in (0, 1); the rest of the backbone, the
perception branch, goes on from F * (1 + M) and gives the prediction (Fukui et al. 2019, and the
authors' published code).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impactx.approaches.abn.cut import SMALLEST_MAP, NoSplit, find_cut
from impactx.models import Classifier, MapKind
from impactx.models.backbones import timm_trunk
from impactx.models.lenet5 import LeNet5Trunk
from impactx.models.seeding import seeded
from impactx.settings import ModelSettings

__all__ = ["AbnNetwork", "AbnOutput", "AttentionBranch", "NoSplit", "attach_branch"]


class AbnOutput(NamedTuple):
    """What the network gives.

    Attributes:
        logits: Of the perception branch, (B, K); they are the prediction.
        maps: The attention maps M, (B, 1, h, w), values in (0, 1).
        attention_logits: Of the attention branch, (B, K).
    """

    logits: Tensor
    maps: Tensor
    attention_logits: Tensor


class AttentionBranch(nn.Module):
    """The attention branch: features F (B, c, h, w) -> F * (1 + M), without detaching M.

    It is a stage and BN; then S, a 1x1 convolution to K channels with BN and ReLU. The attention
    logits are the global average of a 1x1 convolution K -> K of S, and M is sigmoid(BN(3x3
    convolution K -> 1 of S)). These convolutions have no bias and start as the authors' do (He, by
    the outputs).

    Args:
        stage: Keeps the resolution of its input.
        channels: Output channels of the stage.
        num_classes: Number of classes K.
    """

    def __init__(self, stage: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stage, self.norm = stage, nn.BatchNorm2d(channels)
        self.to_classes = nn.Conv2d(channels, num_classes, 1, bias=False)
        self.classes_norm = nn.BatchNorm2d(num_classes)
        self.to_logits = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        self.to_map = nn.Conv2d(num_classes, 1, 3, padding=1, bias=False)
        self.map_norm = nn.BatchNorm2d(1)
        for layer in (self.to_classes, self.to_logits, self.to_map):
            fan_out = layer.kernel_size[0] ** 2 * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_out))
        self._output: tuple[Tensor, Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Return F * (1 + M), and keep M and the attention logits for `take`."""
        s = F.relu(self.classes_norm(self.to_classes(self.norm(self.stage(features)))))
        attention = torch.sigmoid(self.map_norm(self.to_map(s)))
        self._output = attention, self.to_logits(s).mean(dim=(2, 3))
        return features * (1 + attention)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return M and the attention logits of the forward pass just done, and drop them."""
        assert self._output is not None
        output, self._output = self._output, None
        return output


class AbnNetwork(nn.Module):
    """A classifier with an attention branch in its trunk. Everything is trained.

    It maps x (B, 3, H, W), float in [0, 1] at native size, to an `AbnOutput`.

    Args:
        a: The classifier.
        where: The path of the AttentionBranch in its trunk.
    """

    map_kind: MapKind = "attention"

    def __init__(self, a: Classifier, where: str) -> None:
        super().__init__()
        self.a, self.where = a, where

    @property
    def branch(self) -> AttentionBranch:
        """The attention branch."""
        branch = self.a.trunk.get_submodule(self.where)
        assert isinstance(branch, AttentionBranch)
        return branch

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.a.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width) in pixels."""
        return self.a.image_size

    def forward(self, x: Tensor) -> AbnOutput:
        """Return both branches' logits and the attention maps."""
        logits = self.a(x)
        return AbnOutput(logits, *self.branch.take())

    def classify(self, x: Tensor) -> Tensor:
        """Return the perception branch's logits (B, K)."""
        output: AbnOutput = self(x)
        return output.logits

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and M enlarged bilinearly to the native size, (B, 1, H, W)."""
        output: AbnOutput = self(x)
        return output.logits, F.interpolate(output.maps, size=self.image_size, mode="bilinear",
                                            align_corners=False)


def attach_branch(a: Classifier, model: ModelSettings, seed: int) -> str:
    """Put an attention branch into a classifier's trunk, and return its path there.

    Args:
        a: The classifier, on the CPU; it is changed.
        model: The settings of its architecture.
        seed: Of the branch's random weights.

    Raises:
        NoSplit: The trunk has no place for it.
    """
    size, num_classes = a.preprocess.input_size, a.num_classes
    if isinstance(a.trunk, LeNet5Trunk):
        return _attach_to_lenet5(a.trunk, size, num_classes, seed)
    with seeded(seed, "attention"):
        fresh, _ = timm_trunk(model.architecture, pretrained=False)
    cut, stage, channels = find_cut(a.trunk, fresh, size, model)
    with seeded(seed, "attention head"):
        branch = AttentionBranch(stage, channels, num_classes)
    parent, _, name = cut.path.rpartition(".")
    setattr(a.trunk.get_submodule(parent), name,
            nn.Sequential(branch, a.trunk.get_submodule(cut.path)))
    return f"{cut.path}.0"


def _attach_to_lenet5(trunk: LeNet5Trunk, size: tuple[int, int], num_classes: int, seed: int
                      ) -> str:
    """Put the branch before the second convolution.

    The branch's copy of that convolution is padded, or M would be smaller than F, and has no
    pooling.
    """
    height, width = ((side - 4) // 2 for side in size)
    if min(height, width) < SMALLEST_MAP:
        raise NoSplit(
            f"an attention branch needs features of at least {SMALLEST_MAP}x{SMALLEST_MAP} places "
            f"before the last stage, lenet5 has {height}x{width} for inputs of {size[0]}x{size[1]} "
            "pixels: set the model's input_size (32 is its own), or leave abn out")
    with seeded(seed, "attention"):
        stage = nn.Sequential(nn.Conv2d(6, 16, 5, padding=2), nn.ReLU())
    with seeded(seed, "attention head"):
        trunk.between = AttentionBranch(stage, 16, num_classes)
    return "between"
