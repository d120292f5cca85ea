"""IMPACTX whose modules are all trained at once, M too (paper 3.3, single-stage training)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from impactx.models.classifier import Classifier, build_classifier
from impactx.models.decoder import Decoder
from impactx.models.impactx import Impactx, LatentExplanationPredictor, build_impactx
from impactx.settings import ImpactxSettings, ModelSettings, SingleStageSettings


class SingleStageImpactx(Impactx):
    """Impactx with a classifier M that learns; its maps are of its own score C.

    factor: by which a map in the attribution's units is multiplied to be a training target; 0 until there is one.
    """

    frozen = False
    factor: Tensor

    def __init__(self, a: Classifier, lep: LatentExplanationPredictor, decoder: Decoder, c: nn.Linear,
                 m: Literal["logits", "penultimate"]) -> None:
        super().__init__(a, lep, decoder, c, m)
        self.register_buffer("factor", torch.zeros((), dtype=next(a.parameters()).dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """C's logits (B, K), maps (B, channels, H, W) in scaled units, and M's own scores (B, K)."""
        prepared = self.a.preprocess(x)
        z = self.lep(prepared)
        features = self.a.head.hidden(self.a.trunk(prepared))
        own = self.a.head.last(features)
        logits = self.c(torch.cat([own if self.m == "logits" else features, z], dim=1))
        return logits, self.decoder(z), own

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """C's logits and the maps."""
        return self(x)[:2]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.parameters())


def build_single_stage(approach: SingleStageSettings, model: ModelSettings, num_classes: int,
                       image_size: tuple[int, int], *, seed: int, channels: int = 3,
                       load_weights: bool = True) -> SingleStageImpactx:
    """The network on the CPU, before any training: M as `build_classifier` makes it, the rest as `build_impactx`.

    Where M's last layer has no part in any loss (m = penultimate without an auxiliary one) it is not trained.
    """
    a = build_classifier(model, num_classes, image_size, seed=seed, load_weights=load_weights)
    parts = build_impactx(ImpactxSettings(m=approach.m, latent=approach.latent), model, a, seed=seed,
                          channels=channels, load_weights=load_weights)
    net = SingleStageImpactx(parts.a, parts.lep, parts.decoder, parts.c, approach.m)
    if approach.m == "penultimate" and not approach.auxiliary:
        net.a.head.last.requires_grad_(False)
    return net
