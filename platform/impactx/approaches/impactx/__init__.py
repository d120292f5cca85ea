"""IMPACTX in two stages (paper 3.3, 4.3), and its controls: other lambdas, other maps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from impactx.approaches.base import Bench, Candidate, MapsNeeded, Trained, TunedApproach
from impactx.approaches.baseline import Baseline
from impactx.approaches.impactx.loss import map_error
from impactx.approaches.impactx.network import ImpactxNetwork, network_parts
from impactx.approaches.impactx.targets import Maps, targets_of
from impactx.approaches.role import Role
from impactx.datasets.batches import Batch, check_maps
from impactx.models import Classifier
from impactx.settings import AttributionSettings, ModelSettings
from impactx.settings.base import Axis, Lambda, Positive, expand_range
from impactx.settings.extensions import AnyAttribution, approach
from impactx.training.losses import Loss, cross_entropy

__all__ = ["TABLE_1", "Impactx", "ImpactxNetwork", "impactx_loss"]

TABLE_1: list[float] = expand_range({"start": 0.2, "stop": 1.4, "step": 0.2})


def impactx_loss(weight: float) -> Loss:
    """Return the loss of stage 2, equation (1): CE(y, C(m, z)) + weight * MSE(r, LEP-D(x)).

    The MSE is the mean over a map's C*H*W values, in the units of the scaled maps. With weight 0
    the decoder gets zero gradients and stays as it was initialised. The loss needs batches with
    maps.

    Args:
        weight: The lambda of equation (1).
    """

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.maps is None:
            raise ValueError("stage 2 needs a map for every image, and this batch has none")
        logits, maps = model(batch.images)
        ce, mse = cross_entropy(logits, batch), map_error(maps, batch.maps, batch)
        return logits, {"loss": ce + weight * mse, "ce": ce, "mse": mse}

    return loss


@approach
class Impactx(TunedApproach):
    """IMPACTX's second stage (paper 3.3, 4.3), and with other lambdas or maps its controls."""

    kind: Literal["impactx"] = "impactx"
    lambdas: Axis[Lambda] = TABLE_1
    learning_rate_factors: Axis[Positive] = Field([1.0], description=(
        "candidates as well, times learning_rate: lambda = 0 has nothing else to search"))
    m: Literal["logits", "penultimate"] = Field(
        "logits", description="paper 3.1: m are the K scores")
    latent: int = Field(512, ge=1, description="units of the LEP's last layer, paper 4.3")
    lep_start: Literal["as_stage1", "from_stage1"] = Field("as_stage1", description=(
        "as_stage1: the LEP starts where A started (random or pre-trained); from_stage1: at A's "
        "trained layers"))
    maps: Maps = Field("own", description=(
        "what the decoder is taught. own: each image's map; the controls: another image's "
        "(shuffled, shuffled_in_class), or the mean of the training part's maps (mean, class_mean) "
        "for every image"))
    attribution: AnyAttribution | None = Field(None, description=(
        "makes the maps, in a store of its own; None: the experiment's"))

    network: ClassVar[type[nn.Module]] = ImpactxNetwork
    makes_maps: ClassVar[bool] = True

    def candidates(self) -> list[Candidate]:
        """Return the lambdas, each with every factor of the learning rate."""
        return [Candidate(weight, factor)
                for weight in self.lambdas for factor in self.learning_rate_factors]

    def maps_needed(self) -> list[MapsNeeded]:
        """Return the maps of the training images."""
        return [MapsNeeded()]

    def role(self, experiment_attribution: AttributionSettings) -> Role:
        """Return "explained", or the control that these settings make of it."""
        candidates = len(self.candidates())
        if not any(self.lambdas):
            return Role("no_maps", candidates)
        if self.maps == "shuffled":
            return Role("shuffled", candidates)
        own = self.maps == "own" and self.attribution in (None, experiment_attribution)
        return Role("explained" if own else "control", candidates)

    def build(self, model: ModelSettings, classifier: Classifier, *, seed: int, channels: int = 3,
              load_weights: bool = True) -> ImpactxNetwork:
        """Build the network on the CPU around a copy of a trained classifier.

        Args:
            model: The settings of A's architecture.
            classifier: The trained A; it is left as it is.
            seed: Of the random weights. Equal arguments give equal weights, and the global random
                generators stay as they are.
            channels: Of the maps.
            load_weights: See `models.beside.build_lep`, whose errors are raised.
        """
        return ImpactxNetwork(*network_parts(
            model, classifier, m=self.m, latent=self.latent, start=self.lep_start, seed=seed,
            channels=channels, load_weights=load_weights))

    def train(self, bench: Bench) -> Trained:
        """Train LEP, decoder and C around A by equation (1).

        Raises:
            ValueError: The maps are not those of the images.
        """
        assert bench.candidate.weight is not None
        maps, scale = bench.maps()
        # Before maps of other images stand for some of them, in the controls.
        check_maps(maps, bench.data.train.images)
        net = self.build(bench.model, bench.classifier(), seed=bench.seed, channels=maps.shape[1])
        targets, factor = targets_of(self.maps, maps, scale, bench.data.train.labels, bench.split,
                                     bench.seed)
        result = bench.fit(net, impactx_loss(bench.candidate.weight), bench.parts(targets, factor))
        # The network's maps are in scaled units: 1 / scale leads back to the attribution's own.
        return Trained(net, result, self, 1 / scale if isinstance(scale, float) else None)

    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None) -> ImpactxNetwork:
        """Build the network with random weights."""
        assert channels is not None
        return self.build(model, Baseline().rebuild(model, num_classes, image_size), seed=0,
                          channels=channels, load_weights=False)

    def map_channels(self, model: nn.Module) -> int:
        """Return the channels of the decoder's maps."""
        assert isinstance(model, ImpactxNetwork)
        return model.decoder.channels
