"""An ensemble of two classifiers A: what twice the cost of A buys without any explanation."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from impactx.approaches.base import Approach, Bench, Trained
from impactx.approaches.baseline import Baseline
from impactx.datasets.batches import DeviceData
from impactx.models import Classifier
from impactx.settings import ModelSettings
from impactx.settings.extensions import approach
from impactx.training.loop import evaluate
from impactx.training.losses import classification_loss

OTHER_SEED = 1_000_003  # added to a repeat's seed: no repeat has it


class EnsembleNetwork(nn.Module):
    """Classifiers whose probabilities are averaged.

    It maps x (B, 3, H, W), float in [0, 1] at native size, to the logarithm of the members' mean
    probabilities (B, K). These are logits: their softmax is the mean itself.

    Args:
        members: Classifiers for the same images and classes.
    """

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self._first.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Native (height, width) in pixels."""
        return self._first.image_size

    @property
    def _first(self) -> Classifier:
        member = self.members[0]
        assert isinstance(member, Classifier)
        return member

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithm of the mean probabilities, (B, K)."""
        scores = torch.stack([member(x).log_softmax(1) for member in self.members])
        return scores.logsumexp(0) - math.log(len(self.members))

    def classify(self, x: Tensor) -> Tensor:
        """Return the same as `forward`."""
        logits: Tensor = self(x)
        return logits


@approach
class Ensemble(Approach):
    """Control: the mean probabilities of two classifiers A of equal cost, from two seeds."""

    kind: Literal["ensemble"] = "ensemble"

    network: ClassVar[type[nn.Module]] = EnsembleNetwork

    def recipe_extra(self, seed: int) -> dict[str, float | str]:
        """Return the seed of the second classifier."""
        return {"second_seed": seed + OTHER_SEED}

    def train(self, bench: Bench) -> Trained:
        """Train a second A from another seed, and set it beside the repeat's.

        The split and the configuration are those of the first. The history is the second A's; the
        metrics of the best epoch are the ensemble's on the validation part.
        """
        trained = Baseline().train(dataclasses.replace(bench, seed=bench.seed + OTHER_SEED))
        second, result, device = trained.model, trained.fit, bench.loop.device
        assert isinstance(second, Classifier)
        dtype = next(second.parameters()).dtype
        net = EnsembleNetwork([copy.deepcopy(bench.classifier()), second]).to(device, dtype)
        if not result.best_epoch:
            return Trained(net, result, self)
        split, training = bench.split, bench.training
        held = DeviceData(bench.data.train.images, bench.data.train.labels, split.validation,
                          device=device, dtype=dtype, memory_bytes=training.memory_mb * 2**20)
        metrics = evaluate(net, held, classification_loss,
                           common=np.isin(split.validation, split.common),
                           batch_size=training.eval_batch_size, training=training)
        best = {"epoch": result.best_epoch, "val_loss": metrics["loss"],
                "val_accuracy": metrics["accuracy"], "common_accuracy": metrics["common_accuracy"]}
        return Trained(net, result, self, best=best,
                       extra={"second_val_accuracy": result.best["val_accuracy"]})

    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None = None) -> EnsembleNetwork:
        """Build two classifiers with random weights."""
        return EnsembleNetwork([
            Baseline().rebuild(model, num_classes, image_size) for _ in range(2)])
