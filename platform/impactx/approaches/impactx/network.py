"""The network of IMPACTX: A, the LEP, the decoder and the new classifier C (paper 3.2, 4.3)."""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor, nn

from impactx.models import Classifier, Decoder, MapKind
from impactx.models.beside import BesideClassifier, LatentExplanationPredictor, build_c, build_lep
from impactx.models.seeding import seeded
from impactx.settings import ModelSettings


class ImpactxNetwork(BesideClassifier):
    """A classifier that predicts a class and its own map.

    It maps x (B, 3, H, W), float in [0, 1] at native size, to C's logits (B, K) and maps
    (B, channels, H, W). The maps are in scaled units, as the training targets are (setting
    maps.scale): the checkpoint's map_scale leads back to the attribution's own units. Gradients
    with respect to x run through both branches, for attributions of the network itself.

    Args:
        a: The classifier of stage 1; it is frozen, see `BesideClassifier`.
        lep: The latent explanation predictor; stage 2 trains it.
        decoder: Makes the map from z; stage 2 trains it.
        c: One linear layer on [m, z]; stage 2 trains it.
        m: What C gets of A: "logits", its scores (paper 3.1), or "penultimate", its features.
    """

    map_kind: MapKind = "evidence"

    def __init__(self, a: Classifier, lep: LatentExplanationPredictor, decoder: Decoder,
                 c: nn.Linear, m: Literal["logits", "penultimate"]) -> None:
        super().__init__()
        self.a, self.lep, self.decoder, self.c, self.m = a, lep, decoder, c, m
        self.freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return C's logits and the maps."""
        prepared = self.a.preprocess(x)
        z = self.lep(prepared)
        return self.scores(prepared, z), self.decoder(z)

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return C's logits and the maps."""
        logits, maps = self(x)[:2]
        return logits, maps

    def classify(self, x: Tensor) -> Tensor:
        """Return C's logits (B, K) alone, without the decoder's work."""
        prepared = self.a.preprocess(x)
        return self.scores(prepared, self.lep(prepared))

    def encode(self, x: Tensor) -> Tensor:
        """Return z (B, latent), values in (0, 1)."""
        z: Tensor = self.lep(self.a.preprocess(x))
        return z


def network_parts(model: ModelSettings, classifier: Classifier, *, m: Literal[
        "logits", "penultimate"], latent: int, start: Literal["as_stage1", "from_stage1"],
        seed: int, channels: int, load_weights: bool
        ) -> tuple[Classifier, LatentExplanationPredictor, Decoder, nn.Linear,
                   Literal["logits", "penultimate"]]:
    """Build what the network is made of, on the CPU, around a copy of a classifier.

    Args:
        model: The settings of A's architecture.
        classifier: The classifier A; it is left as it is.
        m: What C gets of A.
        latent: Units of the LEP's last layer.
        start: Where the LEP starts, see `models.beside.build_lep`.
        seed: Of the random weights. Equal arguments give equal weights.
        channels: Of the maps.
        load_weights: Whether pre-trained weights are loaded.

    Returns:
        The arguments of `ImpactxNetwork`.

    Raises:
        ValueError: `classifier` and the model settings are of different architectures.
        WeightsError: The pre-trained weights cannot be loaded.
    """
    a = copy.deepcopy(classifier).cpu()
    lep = build_lep(start, model, a, latent, seed=seed, load_weights=load_weights)
    with seeded(seed, "decoder"):
        decoder = Decoder(latent, a.image_size, channels).to(next(a.parameters()).dtype)
    return a, lep, decoder, build_c(m, a, latent, seed=seed), m
