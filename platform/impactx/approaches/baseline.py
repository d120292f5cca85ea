"""The baseline: the classifier A itself (paper 3.3, stage 1)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from impactx.approaches.base import Approach, Bench, Trained
from impactx.approaches.role import Role
from impactx.models import Classifier, build_classifier
from impactx.settings import AttributionSettings, ModelSettings
from impactx.settings.extensions import approach
from impactx.training.losses import classification_loss

BASELINE = "baseline"  # A's name among the approaches


@approach
class Baseline(Approach):
    """The classifier A, trained by cross entropy.

    Every experiment has it under this name; it cannot be given as an entry of `approaches`.
    """

    kind: Literal["baseline"] = "baseline"

    network: ClassVar[type[nn.Module]] = Classifier
    networks: ClassVar[int] = 1
    uses_classifier: ClassVar[bool] = False

    def role(self, experiment_attribution: AttributionSettings) -> Role:
        """Return A's role; its search is the grid, which is not counted here."""
        return Role("a")

    def train(self, bench: Bench) -> Trained:
        """Build A from the seed and train it by cross entropy."""
        a = build_classifier(bench.model, bench.data.num_classes, bench.data.image_size,
                             seed=bench.seed)
        return Trained(a, bench.fit(a, classification_loss), self)

    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None = None) -> Classifier:
        """Build A with random weights."""
        return build_classifier(model, num_classes, image_size, seed=0, load_weights=False)
