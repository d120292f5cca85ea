"""Attention Branch Network: from A's start, by A's configuration; it needs no maps, and makes its own."""

from __future__ import annotations

from impactx.experiment.approaches.base import Approach, Bench, Trained
from impactx.settings import ModelSettings


class AbnApproach(Approach):
    """settings: AbnSettings."""

    makes_maps = True

    def check(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int]) -> None:
        """Raises models.NoSplit where the backbone has no place for an attention branch."""
        from impactx.models import build_abn

        build_abn(self.settings, model, num_classes, image_size, seed=0, load_weights=False)

    def train(self, bench: Bench) -> Trained:
        """See Approach.train."""
        from impactx.training import train_abn

        net, result = train_abn(bench.data, bench.split, bench.model, bench.training, approach=self.settings,
                                **bench.how)
        return Trained(net, result, self.settings)
