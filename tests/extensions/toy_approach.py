"""An approach outside the package, as a user writes one: A's network, trained with label smoothing.

Import the file, and `approaches: {smoothed: {kind: label_smoothing}}` is an entry of an experiment.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from impactx.approaches.base import Bench, Candidate, Trained, TunedApproach
from impactx.datasets.batches import Batch
from impactx.models import Classifier, build_classifier
from impactx.settings import ModelSettings
from impactx.settings.extensions import approach
from impactx.training import classification_loss


@approach
class LabelSmoothing(TunedApproach):
    """A classifier that is trained on smoothed labels (Szegedy et al. 2016)."""

    kind: Literal["label_smoothing"] = "label_smoothing"
    smoothing: float = Field(0.1, ge=0, lt=1, description="share of a label that goes to all classes")
    learning_rate_factors: list[float] = Field([0.5, 1.0], description="candidates, times learning_rate")

    network: ClassVar[type[nn.Module]] = Classifier
    networks: ClassVar[int] = 1
    uses_classifier: ClassVar[bool] = False

    def candidates(self) -> list[Candidate]:
        """Return one candidate for each factor of the learning rate."""
        return [Candidate(learning_rate_factor=factor) for factor in self.learning_rate_factors]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits, and the cross entropy with smoothed labels."""
        logits = model(batch.images)
        each = F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=self.smoothing)
        return logits, {"loss": (each * batch.weights).sum()}

    def train(self, bench: Bench) -> Trained:
        """Build A's network from the seed and train it; the validation part has its plain labels."""
        data = bench.data
        net = build_classifier(bench.model, data.num_classes, data.image_size, seed=bench.seed)
        return Trained(net, bench.fit(net, self.loss, validation_loss=classification_loss), self)

    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None) -> Classifier:
        """Build the network with random weights, for a checkpoint."""
        return build_classifier(model, num_classes, image_size, seed=0, load_weights=False)
