"""WAE (the paper's [7]): IMPACTX's classifier, with z encoded from a map that must be given, not from the image.

A map is r̄ = Σ_k p_k r_k: the maps of all classes, weighted by A's probabilities of the image.  It needs no label, so
it can be made of test images as well; that each of them needs one is the approach's cost.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impactx.models.classifier import Classifier
from impactx.models.impactx import BesideClassifier, LatentExplanationPredictor, start_trunk
from impactx.models.maps import MapKind
from impactx.models.seeding import seeded
from impactx.settings import ModelSettings, WaeSettings


class Wae(BesideClassifier):
    """x (B, 3, H, W), float, in [0, 1], native size, and maps (B, 3, H, W) in the attribution's units -> logits (B, K).

    a: the classifier of stage 1, frozen; encoder: A's architecture with a latent layer, as the LEP, on the scaled
    map; c: one linear layer on [m, z].  factor: by which a map is multiplied; 0: by 1 / its largest absolute value.
    Raises ValueError where the maps are missing or not of the images' shape.
    """

    takes_maps = True
    map_kind: MapKind = "evidence"  # of those that it must be given
    factor: Tensor

    def __init__(self, a: Classifier, encoder: LatentExplanationPredictor, c: nn.Linear,
                 m: Literal["logits", "penultimate"], factor: float) -> None:
        super().__init__()
        self.a, self.encoder, self.c, self.m = a, encoder, c, m
        self.register_buffer("factor", torch.tensor(factor, dtype=next(a.parameters()).dtype))
        self.freeze()

    def forward(self, x: Tensor, maps: Tensor | None = None) -> Tensor:
        if maps is None or maps.shape != x.shape:
            given = "none was given" if maps is None else f"{tuple(maps.shape)} were given"
            raise ValueError(f"wae needs a map for every image, {tuple(x.shape)} as the images are, and {given}: make "
                             "them by the attribution that it was trained with (TrainedModel.predict does it)")
        return self._scores(self.a.preprocess(x), self.encode(maps))

    def classify(self, x: Tensor, maps: Tensor | None = None) -> Tensor:
        """The same as forward."""
        return self(x, maps)

    def encode(self, maps: Tensor) -> Tensor:
        """z (B, latent), values in (0, 1), of maps in the attribution's units."""
        largest = maps.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        scaled = maps * torch.where(self.factor > 0, self.factor, 1 / largest)
        if self.a.preprocess.input_size != self.image_size:
            scaled = F.interpolate(scaled, size=self.a.preprocess.input_size, mode="bilinear", align_corners=False,
                                   antialias=True)
        return self.encoder(scaled)


def build_wae(approach: WaeSettings, model: ModelSettings, classifier: Classifier, *, seed: int, factor: float = 1.0,
              load_weights: bool = True) -> Wae:
    """WAE on the CPU around a copy of a trained `classifier`, which itself is left as it is.

    encoder_start: as `build_impactx`'s lep_start.  Equal arguments give equal weights.  Raises what `start_trunk`
    raises.
    """
    a = copy.deepcopy(classifier).cpu()
    trunk = start_trunk(approach.encoder_start, model, a, seed=seed, load_weights=load_weights)
    dtype = next(a.parameters()).dtype
    with seeded(seed, "lep"):
        encoder = LatentExplanationPredictor(trunk, a.head.in_features, approach.latent).to(dtype)
    width = a.num_classes if approach.m == "logits" else a.num_features
    with seeded(seed, "c"):
        c = nn.Linear(width + approach.latent, a.num_classes).to(dtype)
    return Wae(a, encoder, c, approach.m, factor)
