"""The plan of a cell: which units there are, in which order their results are needed, and the choice made.

A cell is one data set with one model.  Stage 1 searches Table 1's grid; the selected configuration is trained
once for each repeat; each repeat gets its maps; stage 2 is every approach (experiment.stage2): its own search in
repeat 0, and its training in each repeat; at last every final model reads the test set once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from impactx.approaches.baseline import Baseline
from impactx.experiment.stage2 import BASELINE, Basis, Entry, entries_of
from impactx.experiment.units import FORMAT, Unit, fingerprint
from impactx.settings import AttributionSettings, DatasetSettings, ExperimentSettings, ModelSettings

# Settings of a training that do not change what comes out of it.
EXECUTION_ONLY = {"eval_batch_size", "keep_trial_weights", "compile", "memory_mb"}


class SelectionError(RuntimeError):
    """No configuration can be chosen; the message says why."""


@dataclass(frozen=True)
class DataFacts:
    """What the plan must know of a data set. fingerprint, test_fingerprint: of the contents of its two parts.

    test_images: their number, 0 where it is not known.
    """

    fingerprint: str
    train_images: int
    num_classes: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    test_fingerprint: str = ""
    test_images: int = 0


@dataclass(frozen=True)
class Configuration:
    """A point of stage 1's grid."""

    learning_rate: float
    batch_size: int
    validation_fraction: float


def accuracy_for_selection(result: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """What candidates are ordered by: validation accuracy, then the smaller validation cross entropy.

    Not the whole loss: stage 2's grows with lambda, so it cannot compare two of them.
    """
    best = result.get("best")
    return (best[metric], -best.get("val_ce", best["val_loss"])) if best else (-1.0, 0.0)


def select(units: list[Unit], results: Mapping[str, Mapping[str, Any]], metric: str,
           failures: Mapping[str, str] | None = None) -> tuple[Unit, dict[str, Any]]:
    """The unit with the best `metric` (val_accuracy or common_accuracy) of its best epoch, the first of equals.

    results: by key; units without one failed. failures: by name, what made them fail, for the message.
    Raises SelectionError where none is left.
    """
    done = [u for u in units if u.key in results and results[u.key].get("best")]
    if not done:
        diverged = [u.name for u in units if u.key in results]
        reasons = [f"{name}: {error}" for name, error in (failures or {}).items()]
        reasons += [f"{name}: diverged, its loss was not finite in the first epoch" for name in diverged]
        more = f"\n  and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        raise SelectionError(f"none of {len(units)} trials can be selected, {len(units) - len(diverged)} failed and "
                             f"{len(diverged)} diverged:\n  " + "\n  ".join(reasons[:5]) + more)
    chosen = max(done, key=lambda u: accuracy_for_selection(results[u.key], metric))
    return chosen, dict(results[chosen.key])


class Cell:
    """The units of one data set with one model. Holds settings and facts only: nothing is computed here."""

    def __init__(self, settings: ExperimentSettings, dataset: DatasetSettings, model: ModelSettings,
                 facts: DataFacts, weights_file: str | None = None) -> None:
        """weights_file: fingerprint of the file that model.weights names, where it names one."""
        self.settings, self.dataset, self.model, self.facts = settings, dataset, model, facts
        self.name = f"{dataset.name} x {model.name}"
        described = model.model_dump(mode="json", exclude={"name"})
        if weights_file:
            described["weights"] = {"file": weights_file}
        self._common = {
            "data": {"fingerprint": facts.fingerprint, "augmentation": dataset.augmentation.model_dump(mode="json")},
            "model": described,
            "training": settings.training.model_dump(mode="json", exclude=EXECUTION_ONLY),
        }
        self._inputs = {"dataset": dataset.model_dump(mode="json"), "model": model.model_dump(mode="json"),
                        "training": settings.training.model_dump(mode="json"), "scale": settings.maps.scale}
        self._of_a = {"approach": Baseline().model_dump(mode="json"),
                      "attribution": settings.attribution.model_dump(mode="json")}
        self._params = {"dataset": dataset.name, "model": model.name}

    @property
    def fingerprint(self) -> str:
        """Of what all its units depend on: settings, model and the contents of the data set. A job's key, which knows
        the settings alone, stays the same where the files of a data set or of weights are replaced by others."""
        return fingerprint({"format": FORMAT, "test": self.facts.test_fingerprint} | self._common)

    @property
    def selection_metric(self) -> str:
        """By which metric stage 1's trials are compared."""
        return "common_accuracy" if self.settings.grid.select_on == "common" else "val_accuracy"

    def configurations(self) -> list[Configuration]:
        """The points of Table 1's grid that are tried for A, in the order in which they are begun.

        The grid's own order where all are tried to their end; else an order drawn by the seed, for the first of a
        grid are all alike.
        """
        g = self.settings.grid
        points = [Configuration(*p) for p in itertools.product(g.learning_rate, g.batch_size, g.validation_fraction)]
        if g.strategy != "grid" or g.max_trials is not None or g.max_hours is not None:
            random.Random(self.settings.seed).shuffle(points)
        return points[:g.max_trials]

    def _halving(self) -> dict[str, Any]:
        """What decides which trials are stopped early; {} where none is."""
        g, training = self.settings.grid, self.settings.training
        if g.strategy != "asha":
            return {}
        return {"halving": {"metric": self.selection_metric, "grace_epochs": min(g.grace_epochs, training.epochs),
                            "reduction": g.reduction, "epochs": training.epochs,
                            "points": fingerprint([astuple(c) for c in self.configurations()])}}

    def training(self, role: str, name: str, stage: int, approach: str, c: Configuration, repeat: int,
                 recipe: dict[str, Any], inputs: dict[str, Any], params: dict[str, Any]) -> Unit:
        """A training by configuration `c` in one repeat; recipe, inputs, params: what it has beside the usual."""
        seed = self.settings.seed + repeat
        point = {"learning_rate": c.learning_rate, "batch_size": c.batch_size}
        split = {"fraction": c.validation_fraction, "seed": seed,
                 "common_fraction": min(self.settings.grid.validation_fraction)}
        return Unit(role, name, self._common | {"stage": stage, "split": split, "seed": seed} | point | recipe,  # type: ignore[arg-type]
                    self._inputs | inputs,
                    self._params | {"stage": stage, "approach": approach, "repeat": repeat, "seed": seed,
                                    "validation_fraction": c.validation_fraction} | point | params)

    def stage1_trials(self) -> list[Unit]:
        """One trial a point of the grid."""
        halving = self._halving()
        return [self.training("trial", f"A lr={c.learning_rate:g} bs={c.batch_size} vf={c.validation_fraction:g}",
                              1, BASELINE, c, 0, {}, self._of_a | halving, {}) for c in self.configurations()]

    def stage1_model(self, c: Configuration, repeat: int) -> Unit:
        """The training of the selected configuration in one repeat: the classifier A."""
        return self.training("model", f"A repeat {repeat}", 1, BASELINE, c, repeat, {}, self._of_a, {})

    def maps(self, a: Unit, a_result: Mapping[str, Any], repeat: int, *,
             attribution: AttributionSettings | None = None, target: str = "label", part: str = "train") -> Unit:
        """The maps of every image of a part (train or test), of the A that unit `a` trained.

        attribution: None: the experiment's. target: "label": of the true class's score; "class_weighted": of all
        classes, weighted by A's probabilities, for which no label is needed.
        """
        made_by = attribution or self.settings.attribution
        # What is as in every store that was ever made is not said: it must keep its key.
        other = ({"target": target} if target != "label" else {}) | (
            {"part": part, "test": self.facts.test_fingerprint} if part != "train" else {})
        recipe = {"weights": a_result["weights"], "data": self.facts.fingerprint,
                  "model": {"architecture": self.model.architecture, "input_size": self.model.input_size},
                  "attribution": made_by.described()} | other
        said = " ".join(["class-weighted"] * (target != "label") + ["maps"] + ["of test images"] * (part != "train")
                        + [f"by {made_by.method}"] * (made_by != self.settings.attribution))
        return Unit("maps", f"{said} repeat {repeat}", recipe,
                    {"dataset": self._inputs["dataset"], "source": {"kind": "unit", "folder": a.folder},
                     "attribution": recipe["attribution"], "shard_size": self.settings.maps.shard_size} | other,
                    self._params | {"repeat": repeat, "attribution": recipe["attribution"],
                                    "explained_weights": a_result["weights"]} | other)

    def basis(self, c: Configuration, a: Unit, a_result: Mapping[str, Any], repeat: int) -> Basis:
        """What the approaches of one repeat start from: the unit that trained A by configuration `c`, its result."""
        return Basis(self, c, repeat, a, a_result)

    def approaches(self) -> list[Entry]:
        """The approaches that are compared with A, by their names."""
        return entries_of(self.settings)

    def test(self, model: Unit, model_result: Mapping[str, Any]) -> Unit:
        """The one reading of the test set for a final model (with the test images' maps, where it needs them)."""
        maps = model.inputs.get("test_maps")
        return Unit("test", f"test of {model.name}",
                    {"weights": model_result["weights"], "data": self.facts.fingerprint,
                     "test": self.facts.test_fingerprint} | ({"maps": maps["key"]} if maps else {}),
                    {"dataset": self._inputs["dataset"], "checkpoint": model.folder,
                     "training": self._inputs["training"], "best": model_result.get("best") or {}} | (
                        {"maps": maps["folder"]} if maps else {}), model.params)

    def explanations(self, model: Unit, model_result: Mapping[str, Any]) -> Unit | None:
        """The judgement of a final model's maps on test images; None where none is asked for, or none is possible.

        A model that must be given a map with an image (test_maps) has no score of an image alone that maps explain.
        """
        e, approach = self.settings.evaluation, model.params["approach"]
        chosen = e.approaches is None or approach in e.approaches
        if not e.map_images or not chosen or "test_maps" in model.inputs:
            return None
        learned = {} if "maps" not in model.inputs else {"maps": model.recipe["maps"], "split": model.recipe["split"],
                                                         "scale": model.inputs["scale"]}
        of_a = {} if "weights" not in model.recipe else {"a": model.recipe["weights"]}
        recipe = {"weights": model_result["weights"], "data": self.facts.fingerprint,
                  "test": self.facts.test_fingerprint,
                  "evaluation": e.model_dump(mode="json", exclude={"approaches"}),
                  "attribution": self.settings.attribution.model_dump(mode="json")} | learned | of_a
        inputs = {"dataset": self._inputs["dataset"], "checkpoint": model.folder} | (
            {"maps": model.inputs["maps"]} if learned else {}) | ({"a": model.inputs["checkpoint"]} if of_a else {})
        return Unit("explanations", f"explanations of {model.name}", recipe, inputs,
                    model.params)
