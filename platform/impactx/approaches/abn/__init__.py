"""ABN, the Attention Branch Network (Fukui et al., CVPR 2019; the paper's [16])."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from impactx.approaches.abn.network import AbnNetwork, AbnOutput, NoSplit, attach_branch
from impactx.approaches.base import Bench, Candidate, Trained, TunedApproach
from impactx.datasets.batches import Batch
from impactx.models import build_classifier
from impactx.settings import ModelSettings
from impactx.settings.base import Axis, Positive
from impactx.settings.extensions import approach
from impactx.training.losses import cross_entropy

__all__ = ["Abn", "AbnNetwork", "AbnOutput", "NoSplit", "abn_loss"]


def abn_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the perception branch's logits, and the sum of both branches' cross entropies."""
    logits, _, attention_logits = model(batch.images)
    ce, attention_ce = cross_entropy(logits, batch), cross_entropy(attention_logits, batch)
    return logits, {"loss": ce + attention_ce, "ce": ce, "attention_ce": attention_ce}


@approach
class Abn(TunedApproach):
    """Attention Branch Network (Fukui et al. 2019): it needs no maps, and makes its own."""

    kind: Literal["abn"] = "abn"
    learning_rate_factors: Axis[Positive] = Field([1.0], description=(
        "candidates, times learning_rate: as many as IMPACTX has lambdas make its search and this "
        "one equal"))

    network: ClassVar[type[nn.Module]] = AbnNetwork
    makes_maps: ClassVar[bool] = True
    uses_classifier: ClassVar[bool] = False

    def candidates(self) -> list[Candidate]:
        """Return one candidate for each factor of the learning rate."""
        return [Candidate(learning_rate_factor=f) for f in self.learning_rate_factors]

    def check(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int]) -> None:
        """Check that the backbone can be cut.

        Raises:
            NoSplit: It has no place for an attention branch.
        """
        self.build(model, num_classes, image_size, seed=0, load_weights=False)

    def build(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int], *,
              seed: int, load_weights: bool = True) -> AbnNetwork:
        """Build a classifier, as `build_classifier` does, with an attention branch, on the CPU.

        The backbone starts where A starts (pre-trained where A is); the branch starts random, as in
        the authors' code.

        Raises:
            NoSplit: The backbone has no place for an attention branch.
            ValueError: `build_classifier` cannot build the classifier.
        """
        a = build_classifier(model, num_classes, image_size, seed=seed, load_weights=load_weights)
        return AbnNetwork(a, attach_branch(a, model, seed))

    def train(self, bench: Bench) -> Trained:
        """Train the network from A's start by its two cross entropies."""
        net = self.build(bench.model, bench.data.num_classes, bench.data.image_size,
                         seed=bench.seed)
        return Trained(net, bench.fit(net, abn_loss), self)

    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None = None) -> AbnNetwork:
        """Build the network with random weights."""
        return self.build(model, num_classes, image_size, seed=0, load_weights=False)
