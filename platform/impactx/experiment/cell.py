"""A cell: one data set with one model, and the steps that an experiment can ask of it.

Nothing is computed here. In which order the steps are done stands in `flow`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, TypeVar, cast

from impactx.approaches.base import Approach, Candidate
from impactx.approaches.baseline import BASELINE, Baseline
from impactx.experiment.model_source import StepSource
from impactx.experiment.paper import published
from impactx.experiment.steps.base import Step, fingerprint
from impactx.experiment.steps.maps import ExplainedModel, Maps, Part, Target
from impactx.experiment.steps.quality import MapQuality
from impactx.experiment.steps.test import Test
from impactx.experiment.steps.training import (
    Halving,
    MapsRef,
    Model,
    ModelRef,
    Network,
    SplitRecipe,
    Training,
    TrainingResult,
    Trial,
)
from impactx.settings import DatasetSettings, ExperimentSettings, ModelSettings
from impactx.settings.extensions import AttributionSettings

S = TypeVar("S", bound=Step[Any])
Reusable = Callable[[Step[Any]], Step[Any]]


@dataclass(frozen=True)
class DataFacts:
    """What must be known of a data set to plan with it.

    Attributes:
        fingerprint, test_fingerprint: Of the contents of its two parts.
        train_images, test_images: Numbers of images; test_images is 0 where it is not known.
        num_classes, class_names: The labels.
        image_size: Height and width in pixels.
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
    """A point of Table 1's grid."""

    learning_rate: float
    batch_size: int
    validation_fraction: float

    @classmethod
    def of(cls, training: Training) -> Configuration:
        """Return the configuration that a training has."""
        return cls(training.learning_rate, training.batch_size, training.split.fraction)


@dataclass(frozen=True)
class Classifier:
    """A trained A of one repeat: where it is found, and the step that trained it."""

    step: Model
    ref: ModelRef

    @property
    def repeat(self) -> int:
        """The number of the repeat."""
        return self.step.repeat

    @property
    def configuration(self) -> Configuration:
        """The selected configuration."""
        return Configuration.of(self.step)


class Cell:
    """One data set with one model: settings, facts, and the steps made of them."""

    def __init__(self, settings: ExperimentSettings, dataset: DatasetSettings, model: ModelSettings,
                 facts: DataFacts, reusable: Reusable | None = None) -> None:
        """Hold what the steps are made of.

        Args:
            settings: Of the experiment.
            dataset: Of this cell, with an absolute path.
            model: Of this cell, with absolute path and SHA-256 of its file of weights.
            facts: Of the data set.
            reusable: Returns a step as it was finished by other code, where it may be reused. None:
                no step of other code is.
        """
        self.settings, self.dataset, self.model, self.facts = settings, dataset, model, facts
        self._reusable = reusable
        self._known: dict[tuple[str, str], Step[Any]] = {}
        self.name = f"{dataset.name} x {model.name}"
        self.network = Network(
            architecture=model.architecture, weights=model.weights_sha256 or model.weights,
            weights_match=model.weights_match, input_size=model.input_size, mean=model.mean,
            std=model.std)

    def _found(self, step: S) -> S:
        """Return a step by the code that finished it: the keys of those that follow hold its own.

        A step that is asked for again is the same, even where its result came meanwhile.
        """
        if self._reusable is None:
            return step
        key = (step.folder, step.name)
        if key not in self._known:
            self._known[key] = self._reusable(step)
        # The dictionary holds steps of every kind.
        return cast(S, self._known[key])

    @property
    def fingerprint(self) -> str:
        """Of what all its steps depend on.

        A job's key, which knows the settings alone, stays the same where the files of a data set or
        of weights are replaced by others; this one does not.
        """
        return fingerprint({
            "data": self.facts.fingerprint, "test": self.facts.test_fingerprint,
            "augmentation": self.dataset.augmentation.model_dump(mode="json"),
            "network": self.network.model_dump(mode="json"),
            "training": self.settings.training.described()})

    @property
    def selection_metric(self) -> str:
        """By which metric stage 1's trials are compared."""
        return "common_accuracy" if self.settings.grid.select_on == "common" else "val_accuracy"

    @property
    def approaches(self) -> dict[str, Approach]:
        """The approaches that are compared with A, by name, in the experiment's order."""
        return {name: approach for name, approach in self.settings.approaches.items()
                if isinstance(approach, Approach)}

    def configurations(self) -> list[Configuration]:
        """Return the points of Table 1's grid that are tried, in the order in which they begin.

        It is the grid's own order where all are tried to their end, else one drawn by the seed: the
        first points of a grid are all alike.
        """
        g = self.settings.grid
        points = [Configuration(*point) for point in itertools.product(
            g.learning_rate, g.batch_size, g.validation_fraction)]
        if g.strategy != "grid" or g.max_trials is not None or g.max_hours is not None:
            random.Random(self.settings.seed).shuffle(points)
        return points[:g.max_trials]

    def _halving(self) -> Halving | None:
        g, training = self.settings.grid, self.settings.training
        if g.strategy != "asha":
            return None
        return Halving(
            metric=self.selection_metric, grace_epochs=min(g.grace_epochs, training.epochs),
            reduction=g.reduction, epochs=training.epochs,
            points=fingerprint([astuple(point) for point in self.configurations()]))

    # ---- stage 1

    def classifier_trial(self, c: Configuration) -> Trial:
        """Return the trial of one point of the grid for A."""
        name = f"A lr={c.learning_rate:g} bs={c.batch_size} vf={c.validation_fraction:g}"
        return self._found(Trial(**self._training(name, BASELINE, Baseline(), c, 0),
                                 halving=self._halving()))

    def classifier(self, c: Configuration, repeat: int) -> Model:
        """Return the training of the classifier A in one repeat."""
        return self._found(Model(**self._training(
            f"A repeat {repeat}", BASELINE, Baseline(), c, repeat)))

    # ---- maps

    def attribution(self, approach: Approach) -> AttributionSettings:
        """Return what makes an approach's maps: its own attribution, or the experiment's."""
        return approach.own_attribution or self.settings.attribution

    def maps(self, a: Classifier, attribution: AttributionSettings, target: Target = "label",
             part: Part = "train") -> Maps:
        """Return the making of one map for every image of a part, of a repeat's A."""
        s = self.settings
        words = (["class-weighted"] * (target != "label") + ["maps"]
                 + ["of test images"] * (part != "train")
                 + [f"by {attribution.method}"] * (attribution != s.attribution))
        return self._found(Maps(
            name=f"{' '.join(words)} repeat {a.repeat}", dataset_name=self.dataset.name,
            model_name=self.model.name, repeat=a.repeat, weights=a.ref.weights,
            data=self.facts.fingerprint,
            test=self.facts.test_fingerprint if part == "test" else "",
            explained=ExplainedModel(architecture=self.model.architecture,
                                     input_size=self.model.input_size),
            attribution=attribution, target=target, part=part,
            source=StepSource(folder=a.ref.folder), dataset=self.dataset,
            shard_size=s.maps.shard_size))

    def maps_of(self, name: str, a: Classifier) -> list[Maps]:
        """Return the stores of maps that an approach needs in a repeat."""
        approach = self.approaches[name]
        return [self.maps(a, self.attribution(approach), need.target, need.part)
                for need in approach.maps_needed()]

    # ---- stage 2

    def approach_trial(self, name: str, candidate: Candidate, a: Classifier) -> Trial:
        """Return the trial of one candidate of an approach's search, around a repeat's A."""
        label = candidate.label()
        return self._found(Trial(**self._stage2(f"{name} {label}".strip(), name, candidate, a)))

    def approach_model(self, name: str, candidate: Candidate, a: Classifier) -> Model:
        """Return the final training of an approach in a repeat."""
        label = f"{name} {candidate.label()}".strip()
        return self._found(Model(**self._stage2(f"{label} repeat {a.repeat}", name, candidate, a)))

    def _stage2(self, title: str, name: str, candidate: Candidate, a: Classifier
                ) -> dict[str, object]:
        approach, c = self.approaches[name], a.configuration
        rate, batch_size = approach.point(c.learning_rate, c.batch_size, candidate)
        point = Configuration(rate, batch_size, c.validation_fraction)
        stores = {maps.part: MapsRef(key=maps.key, folder=maps.folder)
                  for maps in self.maps_of(name, a)}
        return self._training(title, name, approach, point, a.repeat) | {
            "candidate": candidate, "maps": stores.get("train"), "test_maps": stores.get("test"),
            "classifier": a.ref if approach.uses_classifier else None,
            "attribution": self.attribution(approach) if approach.explains_itself else None,
            "map_scale": self.settings.maps.scale if stores or approach.explains_itself else None}

    def _training(self, title: str, name: str, approach: Approach, c: Configuration, repeat: int
                  ) -> dict[str, object]:
        s = self.settings
        return {
            "name": title, "dataset_name": self.dataset.name, "model_name": self.model.name,
            "approach_name": name, "repeat": repeat, "stage": 1 if name == BASELINE else 2,
            "data": self.facts.fingerprint, "augmentation": self.dataset.augmentation,
            "network": self.network, "training": s.training,
            "split": SplitRecipe(fraction=c.validation_fraction, seed=s.seed + repeat,
                                 common_fraction=min(s.grid.validation_fraction)),
            "seed": s.seed + repeat, "learning_rate": c.learning_rate, "batch_size": c.batch_size,
            "approach": approach, "dataset": self.dataset, "model": self.model,
            "maps_attribution": self.attribution(approach)}

    # ---- test and map quality

    def test(self, model: Model, result: TrainingResult) -> Test:
        """Return the one reading of the test set by a final model."""
        paper = published(self.dataset, self.model.name, model.approach_name or "")
        return self._found(Test.of(model, result, self.facts.test_fingerprint, paper))

    def map_quality(self, model: Model, result: TrainingResult) -> MapQuality | None:
        """Return the judgement of a final model's maps on test images.

        It is None where none is asked for, and for a model that must be given a map with an image:
        there is no score of an image alone that maps could explain.
        """
        e = self.settings.evaluation
        chosen = e.approaches is None or model.approach_name in e.approaches
        if not e.map_images or not chosen or model.test_maps is not None:
            return None
        return self._found(MapQuality.of(model, result, self.facts.test_fingerprint, e,
                                         self.settings.attribution))
