"""IMPACTX: the frozen classifier M, the LEP, the decoder and the new classifier C (paper 3.2, 3.3, 4.3)."""

from __future__ import annotations

import copy
from typing import Literal, Self

import torch
from torch import Tensor, nn

from impactx.models.classifier import Classifier, build_trunk
from impactx.models.decoder import Decoder
from impactx.models.maps import MapKind
from impactx.models.seeding import seeded
from impactx.models.weights import compare_tensors
from impactx.settings import ImpactxSettings, ModelSettings


class LatentExplanationPredictor(nn.Module):
    """LEP (paper 4.3): A's architecture, all its fully connected layers replaced by one, and a sigmoid.

    Preprocessed images (B, 3, *input_size) -> z (B, latent), values in (0, 1).
    """

    def __init__(self, trunk: nn.Module, num_features: int, latent: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.to_latent = nn.Linear(num_features, latent)

    def forward(self, prepared: Tensor) -> Tensor:
        return torch.sigmoid(self.to_latent(self.trunk(prepared)))


class BesideClassifier(nn.Module):
    """A new classifier C on [m, z]: m from a classifier A, z from whatever the subclass has beside it.

    A subclass holds a, c (one linear layer) and m ("logits", paper 3.1: A's scores; "penultimate": its features).
    """

    a: Classifier
    c: nn.Linear
    m: Literal["logits", "penultimate"]
    frozen = True  # A requires no gradient and stays in eval mode, whatever train() says

    def freeze(self) -> None:
        """To be called when a is there."""
        self.a.requires_grad_(not self.frozen)
        self.train(self.training)

    @property
    def num_classes(self) -> int:
        return self.a.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width)."""
        return self.a.image_size

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; a frozen `a` is always in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.a.eval()
        return self

    def _scores(self, prepared: Tensor, z: Tensor) -> Tensor:
        m = self.a.head.hidden(self.a.trunk(prepared))
        if self.m == "logits":
            m = self.a.head.last(m)
        return self.c(torch.cat([m, z], dim=1))


class Impactx(BesideClassifier):
    """x (B, 3, H, W), float, in [0, 1], native size -> C's logits (B, K) and maps (B, channels, H, W).

    The maps are in scaled units, as the training targets are (setting maps.scale): multiply by the
    checkpoint's map_scale for the attribution's own units.

    a: the classifier of stage 1, whose scores are m (`m` = logits, paper 3.1) or whose penultimate features
    are (`m` = penultimate).  It is frozen: its parameters require no gradient, and it stays in eval mode
    whatever train() says, so its batch-norm statistics do not move either.  Gradients with respect to x run
    through both branches, for attributions of IMPACTX itself.  lep, decoder, c: what stage 2 trains; c is one
    linear layer on [m, z].
    """

    map_kind: MapKind = "evidence"

    def __init__(self, a: Classifier, lep: LatentExplanationPredictor, decoder: Decoder, c: nn.Linear,
                 m: Literal["logits", "penultimate"]) -> None:
        super().__init__()
        self.a, self.lep, self.decoder, self.c, self.m = a, lep, decoder, c, m
        self.freeze()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of LEP, decoder and C, in that order."""
        return [p for part in (self.lep, self.decoder, self.c) for p in part.parameters()]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        prepared = self.a.preprocess(x)
        z = self.lep(prepared)
        return self._scores(prepared, z), self.decoder(z)

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same as forward."""
        return self(x)

    def classify(self, x: Tensor) -> Tensor:
        """C's logits (B, K) alone, without the decoder's work."""
        prepared = self.a.preprocess(x)
        return self._scores(prepared, self.lep(prepared))

    def encode(self, x: Tensor) -> Tensor:
        """z (B, latent), values in (0, 1)."""
        return self.lep(self.a.preprocess(x))


def start_trunk(start: Literal["as_stage1", "from_stage1"], model: ModelSettings, a: Classifier, *, seed: int,
                load_weights: bool = True) -> nn.Module:
    """The trunk of a second network of A's architecture.

    as_stage1: it starts as A's did by model.weights: pre-trained, or random from `seed` (with the seed of
    `build_classifier` at the very values A started from); from_stage1: at a copy of the trained trunk of `a`.
    Raises ValueError where `a` and the model settings are of different architectures, and what `build_trunk` raises.
    """
    if start == "from_stage1":
        return copy.deepcopy(a.trunk).requires_grad_(True)
    trunk = build_trunk(model, a.preprocess.input_size, seed=seed, load_weights=load_weights)
    if compare_tensors(trunk.state_dict(), a.trunk.state_dict()):
        raise ValueError(f"the classifier at hand is not of the architecture {model.architecture} that "
                         f"its model settings ({model.name!r}) name: their tensors differ")
    return trunk


def build_impactx(approach: ImpactxSettings, model: ModelSettings, classifier: Classifier, *, seed: int,
                  channels: int = 3, load_weights: bool = True) -> Impactx:
    """IMPACTX on the CPU around a copy of a trained `classifier`, which itself is left as it is.

    approach.lep_start: see `start_trunk`.  `channels` of the maps.  Equal arguments give equal weights; the global
    random generators stay as they are.  load_weights=False: as in `build_trunk`.  Raises what `start_trunk` raises.
    """
    a = copy.deepcopy(classifier).cpu()
    trunk = start_trunk(approach.lep_start, model, a, seed=seed, load_weights=load_weights)
    dtype = next(a.parameters()).dtype
    with seeded(seed, "lep"):
        lep = LatentExplanationPredictor(trunk, a.head.in_features, approach.latent).to(dtype)
    with seeded(seed, "decoder"):
        decoder = Decoder(approach.latent, a.image_size, channels).to(dtype)
    width = a.num_classes if approach.m == "logits" else a.num_features
    with seeded(seed, "c"):
        c = nn.Linear(width + approach.latent, a.num_classes).to(dtype)
    return Impactx(a, lep, decoder, c, approach.m)
