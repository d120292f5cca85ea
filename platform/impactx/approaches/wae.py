"""WAE, weighted average explanations (Apicella et al. 2023, the paper's [7]).

IMPACTX's classifier, with z encoded from a map that must be given, not from the image. A map is
sum_k p_k r_k: the maps of all classes, weighted by A's probabilities of the image. It needs no
label, so it can be made of test images as well; that each of them needs one is the approach's cost.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from impactx.approaches.base import Bench, Candidate, MapsNeeded, Trained, TunedApproach
from impactx.approaches.baseline import Baseline
from impactx.datasets.batches import Batch
from impactx.models import Classifier, MapKind
from impactx.models.beside import BesideClassifier, LatentExplanationPredictor, build_c, build_lep
from impactx.settings import ModelSettings
from impactx.settings.base import Axis, Positive
from impactx.settings.extensions import AnyAttribution, approach
from impactx.training.losses import cross_entropy


class WaeNetwork(BesideClassifier):
    """A new classifier on A's scores and a code of a given map.

    It maps x (B, 3, H, W), float in [0, 1] at native size, and maps (B, 3, H, W) in the
    attribution's units to logits (B, K).

    Args:
        a: The classifier of stage 1; it is frozen.
        encoder: A's architecture with a latent layer, as the LEP, on the scaled map.
        c: One linear layer on [m, z].
        m: What C gets of A, see `BesideClassifier`.
        factor: What a map is multiplied by; 0: by 1 / its largest absolute value.
    """

    takes_maps = True
    map_kind: MapKind = "evidence"  # of the maps that it is given
    factor: Tensor

    def __init__(self, a: Classifier, encoder: LatentExplanationPredictor, c: nn.Linear,
                 m: Literal["logits", "penultimate"], factor: float) -> None:
        super().__init__()
        self.a, self.encoder, self.c, self.m = a, encoder, c, m
        self.register_buffer("factor", torch.tensor(factor, dtype=next(a.parameters()).dtype))
        self.freeze()

    def forward(self, x: Tensor, maps: Tensor | None = None) -> Tensor:
        """Return the logits (B, K).

        Raises:
            ValueError: The maps are missing, or not of the images' shape.
        """
        if maps is None or maps.shape != x.shape:
            given = "none was given" if maps is None else f"{tuple(maps.shape)} were given"
            raise ValueError(
                f"wae needs a map for every image, {tuple(x.shape)} as the images are, and {given}:"
                " make them by the attribution that it was trained with (TrainedModel.predict does"
                " it)")
        return self.scores(self.a.preprocess(x), self.encode(maps))

    def classify(self, x: Tensor, maps: Tensor | None = None) -> Tensor:
        """Return the same as `forward`."""
        logits: Tensor = self(x, maps)
        return logits

    def encode(self, maps: Tensor) -> Tensor:
        """Return z (B, latent), values in (0, 1), of maps in the attribution's units."""
        tiny = torch.finfo(maps.dtype).tiny
        largest = maps.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
        scaled = maps * torch.where(self.factor > 0, self.factor, 1 / largest)
        if self.a.preprocess.input_size != self.image_size:
            scaled = F.interpolate(scaled, size=self.a.preprocess.input_size, mode="bilinear",
                                   align_corners=False, antialias=True)
        z: Tensor = self.encoder(scaled)
        return z


def wae_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and the cross entropy of C(m, z), z encoded from each image's map.

    Raises:
        ValueError: The batch has no maps.
    """
    if batch.maps is None:
        raise ValueError("wae needs a map for every image, and this batch has none")
    logits = model(batch.images, batch.maps)
    return logits, {"loss": cross_entropy(logits, batch)}


@approach
class Wae(TunedApproach):
    """Weighted average explanations (Apicella et al. 2023): test images need maps as well."""

    kind: Literal["wae"] = "wae"
    learning_rate_factors: Axis[Positive] = Field([1.0], description=(
        "candidates, times learning_rate: as many as IMPACTX has lambdas make its search and this "
        "one equal"))
    m: Literal["logits", "penultimate"] = Field("logits", description="as IMPACTX's")
    latent: int = Field(
        512, ge=1, description="units of the encoder's last layer, as the LEP's")
    encoder_start: Literal["as_stage1", "from_stage1"] = Field(
        "as_stage1", description="as IMPACTX's lep_start")
    attribution: AnyAttribution | None = Field(
        None, description="makes the class maps; None: the experiment's")

    network: ClassVar[type[nn.Module]] = WaeNetwork

    def candidates(self) -> list[Candidate]:
        """Return one candidate for each factor of the learning rate."""
        return [Candidate(learning_rate_factor=f) for f in self.learning_rate_factors]

    def maps_needed(self) -> list[MapsNeeded]:
        """Return the class-weighted maps of the training images and of the test images."""
        return [MapsNeeded("class_weighted", "train"), MapsNeeded("class_weighted", "test")]

    def build(self, model: ModelSettings, classifier: Classifier, *, seed: int, factor: float = 1.0,
              load_weights: bool = True) -> WaeNetwork:
        """Build the network on the CPU around a copy of a trained classifier.

        Args:
            model: The settings of A's architecture.
            classifier: The trained A; it is left as it is.
            seed: Of the random weights. Equal arguments give equal weights.
            factor: What a map is multiplied by; 0: by 1 / its largest absolute value.
            load_weights: See `models.beside.build_lep`, whose errors are raised.
        """
        a = copy.deepcopy(classifier).cpu()
        encoder = build_lep(self.encoder_start, model, a, self.latent, seed=seed,
                            load_weights=load_weights)
        c = build_c(self.m, a, self.latent, seed=seed)
        return WaeNetwork(a, encoder, c, self.m, factor)

    def train(self, bench: Bench) -> Trained:
        """Train the encoder and C by cross entropy, on class-weighted maps of the images.

        The network itself applies the scale. The checkpoint's settings name the attribution:
        whoever uses the model needs it.
        """
        maps, scale = bench.maps()
        net = self.build(bench.model, bench.classifier(), seed=bench.seed,
                         factor=float(scale) if np.ndim(scale) == 0 else 0.0)
        result = bench.fit(net, wae_loss, bench.parts(maps))
        return Trained(net, result, self.model_copy(update={"attribution": bench.attribution}))

    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None = None) -> WaeNetwork:
        """Build the network with random weights."""
        return self.build(model, Baseline().rebuild(model, num_classes, image_size), seed=0,
                          load_weights=False)
