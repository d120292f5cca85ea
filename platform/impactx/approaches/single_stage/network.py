"""The network of IMPACTX whose modules are all trained at once, M too (paper 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from impactx.approaches.impactx.network import ImpactxNetwork
from impactx.models import Classifier, Decoder
from impactx.models.beside import LatentExplanationPredictor


class SingleStageNetwork(ImpactxNetwork):
    """IMPACTX with a classifier M that learns; its maps are of its own score C.

    Attributes:
        factor: What a map in the attribution's units is multiplied by to be a training target; 0
            until there is one.
    """

    frozen = False
    factor: Tensor

    def __init__(self, a: Classifier, lep: LatentExplanationPredictor, decoder: Decoder,
                 c: nn.Linear, m: Literal["logits", "penultimate"]) -> None:
        super().__init__(a, lep, decoder, c, m)
        self.register_buffer("factor", torch.zeros((), dtype=next(a.parameters()).dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return C's logits (B, K), maps (B, channels, H, W) in scaled units, and M's own scores.

        M's scores are (B, K).
        """
        prepared = self.a.preprocess(x)
        z = self.lep(prepared)
        features = self.a.head.hidden(self.a.trunk(prepared))
        own = self.a.head.last(features)
        logits = self.c(torch.cat([own if self.m == "logits" else features, z], dim=1))
        return logits, self.decoder(z), own
