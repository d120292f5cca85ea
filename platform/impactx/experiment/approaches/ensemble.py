"""An ensemble of two classifiers A: the one of this repeat, and one more from another seed."""

from __future__ import annotations

from typing import Any

from impactx.experiment.approaches.base import Approach, Basis, Bench, Point, Trained

OTHER_SEED = 1_000_003  # added to a repeat's seed: no repeat has it


class EnsembleApproach(Approach):
    """settings: EnsembleSettings. The unit trains the second A, on the split and by the configuration of the first."""

    def _recipe(self, basis: Basis, point: Point) -> dict[str, Any]:
        return {"weights": basis.a_result["weights"], "second_seed": self._second_seed(basis)}

    def _inputs(self, basis: Basis) -> dict[str, Any]:
        return {"checkpoint": basis.a.folder}

    def _params(self, basis: Basis, point: Point) -> dict[str, Any]:
        return {"second_seed": self._second_seed(basis)}

    def _second_seed(self, basis: Basis) -> int:
        return basis.cell.settings.seed + basis.repeat + OTHER_SEED

    def train(self, bench: Bench) -> Trained:
        """See Approach.train. The history is the second A's, the result's `best` the ensemble's."""
        from impactx.training import train_ensemble

        how = dict(bench.how) | {"seed": bench.unit.recipe["second_seed"]}
        net, result, found = train_ensemble(bench.data, bench.split, bench.model, bench.training,
                                            classifier=bench.classifier(), **how)
        if found is None:
            return Trained(net, result, self.settings)
        best = {"epoch": result.best_epoch, "val_loss": found["loss"], "val_accuracy": found["accuracy"],
                "common_accuracy": found["common_accuracy"]}
        return Trained(net, result, self.settings, best=best,
                       extra={"second_val_accuracy": result.best["val_accuracy"]})
