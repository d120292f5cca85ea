"""IMPACTX in a single stage (paper 3.3): all modules at once, on maps of the network itself."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from impactx.approaches.base import Bench, Candidate, Trained, TunedApproach
from impactx.approaches.impactx import TABLE_1
from impactx.approaches.impactx.loss import map_error
from impactx.approaches.impactx.network import network_parts
from impactx.approaches.role import Role
from impactx.approaches.single_stage.network import SingleStageNetwork
from impactx.approaches.single_stage.rounds import SelfExplanation
from impactx.datasets import Dataset
from impactx.datasets.batches import Batch
from impactx.models import build_classifier
from impactx.models.logits import Logits
from impactx.settings import AttributionSettings, ModelSettings
from impactx.settings.base import Axis, Lambda
from impactx.settings.extensions import AnyAttribution, approach
from impactx.training.losses import Loss, cross_entropy

__all__ = ["SingleStage", "SingleStageNetwork", "single_stage_loss"]


def single_stage_loss(weight: float, auxiliary: float) -> Loss:
    """Return equation (1) for a learning M: as `impactx_loss`, plus auxiliary * CE of M's scores.

    An image that has no map yet (NaNs in its place) has no part in the MSE; nor has any image in a
    batch without maps. An MSE of 0 then stands for "nothing to learn from".

    Args:
        weight: The lambda of equation (1).
        auxiliary: Weight of the cross entropy of M's own scores.
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits, maps, own = model(batch.images)
        ce = cross_entropy(logits, batch)
        # Without a target a map is its own: the decoder takes part with a gradient of 0, as
        # data-parallel workers need.
        target = maps.detach()
        if batch.maps is not None:
            absent = batch.maps.isnan().flatten(1).any(1)[:, None, None, None]
            target = torch.where(absent, target, batch.maps)
        mse = map_error(maps, target, batch)
        terms = {"loss": ce + weight * mse, "ce": ce, "mse": mse}
        if auxiliary:
            terms["auxiliary_ce"] = cross_entropy(own, batch)
            terms["loss"] = terms["loss"] + auxiliary * terms["auxiliary_ce"]
        return logits, terms

    return loss


def _classification(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the cross entropy of C's logits: images of the validation part have no maps."""
    logits = model(batch.images)[0]
    return logits, {"loss": cross_entropy(logits, batch)}


@approach
class SingleStage(TunedApproach):
    """IMPACTX trained in a single stage (paper 3.3): M too, on maps of the network as it learns."""

    kind: Literal["single_stage"] = "single_stage"
    lambdas: Axis[Lambda] = TABLE_1
    m: Literal["logits", "penultimate"] = Field("logits", description="as IMPACTX's")
    latent: int = Field(512, ge=1, description="as IMPACTX's")
    explain_every: int = Field(
        1, ge=1, description="epochs between two rounds of maps; paper: 1")
    explain_share: float = Field(1.0, gt=0, le=1, description=(
        "share of the training images explained in a round, drawn anew; the others keep the map "
        "they have, or have no part in the MSE until their first"))
    auxiliary: float = Field(0.0, ge=0, allow_inf_nan=False, description=(
        "weight of a cross entropy of M's own scores; 0: M learns through C alone"))
    attribution: AnyAttribution | None = Field(
        None, description="makes the maps; None: the experiment's")

    network: ClassVar[type[nn.Module]] = SingleStageNetwork
    makes_maps: ClassVar[bool] = True
    uses_classifier: ClassVar[bool] = False
    explains_itself: ClassVar[bool] = True

    def candidates(self) -> list[Candidate]:
        """Return the lambdas."""
        return [Candidate(weight) for weight in self.lambdas]

    def role(self, experiment_attribution: AttributionSettings) -> Role:
        """Return "explained", or the control that these settings make of it."""
        candidates = len(self.candidates())
        if not any(self.lambdas):
            return Role("no_maps", candidates, at_once=True)
        own = self.attribution in (None, experiment_attribution)
        return Role("explained" if own else "control", candidates, at_once=True)

    def maps_in_training(self, images: int, epochs: int) -> int:
        """Return the maps of a round after every explain_every epochs but the last."""
        return (epochs - 1) // self.explain_every * max(1, round(self.explain_share * images))

    def explains(self, model: ModelSettings, data: Dataset, seed: int) -> nn.Module:
        """Return the network's own logits."""
        return Logits(self.build(model, data.num_classes, data.image_size, seed=seed,
                                 channels=data.channels))

    def without_maps_in_training(self) -> Self:
        """Return the same with no round of maps in any training."""
        return self.model_copy(update={"explain_every": 10**6})

    def build(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int], *,
              seed: int, channels: int = 3, load_weights: bool = True) -> SingleStageNetwork:
        """Build the network on the CPU: M as `build_classifier` does, the rest as IMPACTX's.

        Where M's last layer has no part in any loss (m = penultimate without an auxiliary one), it
        is not trained.
        """
        a = build_classifier(model, num_classes, image_size, seed=seed, load_weights=load_weights)
        net = SingleStageNetwork(*network_parts(
            model, a, m=self.m, latent=self.latent, start="as_stage1", seed=seed,
            channels=channels, load_weights=load_weights))
        if self.m == "penultimate" and not self.auxiliary:
            net.a.head.last.requires_grad_(False)
        return net

    def train(self, bench: Bench) -> Trained:
        """Train all modules at once by equation (1).

        The scale of the maps is fitted anew in every round. Epochs with a round of maps have
        explained_images and explain_seconds in the history, and `seconds` has both; the result has
        the seconds of all rounds.
        """
        assert bench.candidate.weight is not None
        data = bench.data
        net = self.build(bench.model, data.num_classes, data.image_size, seed=bench.seed,
                         channels=data.channels)
        shape = (len(data.train.labels), data.channels, *data.image_size)
        maps = np.full(shape, np.nan, np.float32)
        parts = bench.parts(maps, pending=True)
        rounds = SelfExplanation(bench, parts.train, maps, every=self.explain_every,
                                 share=self.explain_share)
        result = bench.fit(net, single_stage_loss(bench.candidate.weight, self.auxiliary), parts,
                           validation_loss=_classification, between=rounds)
        if not result.stopped:
            rounds.forget(len(result.history))
        factor = float(net.factor)
        seconds = sum(row.get("explain_seconds", 0.0) for row in result.history)
        return Trained(net, result, self, 1 / factor if factor > 0 else None,
                       extra={"explain_seconds": seconds})

    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None) -> SingleStageNetwork:
        """Build the network with random weights."""
        assert channels is not None
        return self.build(model, num_classes, image_size, seed=0, channels=channels,
                          load_weights=False)

    def map_channels(self, model: nn.Module) -> int:
        """Return the channels of the decoder's maps."""
        assert isinstance(model, SingleStageNetwork)
        return model.decoder.channels
