"""What IMPACTX and WAE have in common: a second network beside A, and a new classifier C on both.

The second network (the LEP of IMPACTX, the encoder of WAE) has A's architecture and gives a latent
code z; C predicts from A's scores (or features) m and from z (paper 3.2, 4.3).
"""

from __future__ import annotations

import copy
from typing import Literal, Self

import torch
from torch import Tensor, nn

from impactx.models.classifier import Classifier, build_trunk
from impactx.models.seeding import seeded
from impactx.models.weights import compare_tensors
from impactx.settings import ModelSettings


class LatentExplanationPredictor(nn.Module):
    """The LEP (paper 4.3): A's architecture with one fully connected layer, and a sigmoid.

    It maps preprocessed images (B, 3, *input_size) to z (B, latent) with values in (0, 1).

    Args:
        trunk: The feature extractor, (B, 3, *input_size) -> (B, num_features).
        num_features: Number of features that the trunk gives.
        latent: Units of the last layer.
    """

    def __init__(self, trunk: nn.Module, num_features: int, latent: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.to_latent = nn.Linear(num_features, latent)

    def forward(self, prepared: Tensor) -> Tensor:
        """Return z (B, latent) of preprocessed images."""
        return torch.sigmoid(self.to_latent(self.trunk(prepared)))


class BesideClassifier(nn.Module):
    """A new classifier C on [m, z]: m from a classifier A, z from what the subclass has beside it.

    A subclass sets the attributes and then calls `freeze`.

    Attributes:
        a: The classifier A.
        c: One linear layer on [m, z].
        m: "logits" where m are A's scores (paper 3.1), "penultimate" where they are its features.
        frozen: Whether A requires no gradient and stays in eval mode, whatever `train` is given,
            so that its batch-norm statistics do not move either.
    """

    a: Classifier
    c: nn.Linear
    m: Literal["logits", "penultimate"]
    frozen = True

    def freeze(self) -> None:
        """Freeze A where `frozen` says so; to be called once `a` is set."""
        self.a.requires_grad_(not self.frozen)
        self.train(self.training)

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.a.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width) in pixels."""
        return self.a.image_size

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; a frozen A always stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.a.eval()
        return self

    def scores(self, prepared: Tensor, z: Tensor) -> Tensor:
        """Return C's logits (B, K).

        Args:
            prepared: Preprocessed images, (B, 3, *input_size).
            z: Latent codes, (B, latent).
        """
        m = self.a.head.hidden(self.a.trunk(prepared))
        if self.m == "logits":
            m = self.a.head.last(m)
        logits: Tensor = self.c(torch.cat([m, z], dim=1))
        return logits


def build_lep(start: Literal["as_stage1", "from_stage1"], model: ModelSettings, a: Classifier,
              latent: int, *, seed: int, load_weights: bool = True) -> LatentExplanationPredictor:
    """Build a second network of A's architecture that ends in a latent layer.

    Args:
        start: "as_stage1": the trunk starts as A's did by model.weights, pre-trained or random from
            `seed` (with the seed of `build_classifier` at the very values A started from);
            "from_stage1": at a copy of A's trained trunk.
        model: The settings of A's architecture.
        a: The classifier A; it is left as it is.
        latent: Units of the last layer.
        seed: Of the random weights. Equal arguments give equal weights.
        load_weights: Whether pre-trained weights are loaded; see `build_trunk`.

    Raises:
        ValueError: `a` and the model settings are of different architectures.
        WeightsError: The pre-trained weights cannot be loaded.
    """
    if start == "from_stage1":
        trunk = copy.deepcopy(a.trunk).requires_grad_(True)
    else:
        trunk = build_trunk(model, a.preprocess.input_size, seed=seed, load_weights=load_weights)
        if compare_tensors(trunk.state_dict(), a.trunk.state_dict()):
            raise ValueError(
                f"the classifier at hand is not of the architecture {model.architecture} that its "
                f"model settings ({model.name!r}) name: their tensors differ")
    with seeded(seed, "lep"):
        lep = LatentExplanationPredictor(trunk, a.head.in_features, latent)
    return lep.to(next(a.parameters()).dtype)


def build_c(m: Literal["logits", "penultimate"], a: Classifier, latent: int, *, seed: int
            ) -> nn.Linear:
    """Build the new classifier C, one linear layer on [m, z], random from `seed`."""
    width = a.num_classes if m == "logits" else a.num_features
    with seeded(seed, "c"):
        c = nn.Linear(width + latent, a.num_classes)
    return c.to(next(a.parameters()).dtype)
