"""Map quality: a final model's maps are judged on test images, by `impactx.evaluation.judgement`.

The step reads the test images after the test has; it chooses nothing, it describes a finished
model.
"""

from __future__ import annotations

import io
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from impactx.datasets import Dataset, make_split
from impactx.datasets.splits import stratified_draw
from impactx.evaluation.judgement import JudgedImages, JudgedModel, MapQualityError, judge
from impactx.evaluation.judgement import MapQuality as Judgement
from impactx.evaluation.orders import Order, order_of_a, orders_of
from impactx.evaluation.targets import Targets, mean_maps
from impactx.experiment.artifacts import MAP_SCORES, RESULT
from impactx.experiment.model_source import StepSource, open_model
from impactx.experiment.steps.base import (
    OUTSIDE_KEY,
    Context,
    Result,
    Step,
    StepError,
    local_file,
)
from impactx.experiment.steps.training import MapsRef, Model, ModelRef, SplitRecipe, TrainingResult
from impactx.experiment.workplace import Workplace
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.maps.scale import map_scale
from impactx.explain.maps.store import MapStore
from impactx.settings import DatasetSettings, EvaluationSettings
from impactx.settings.extensions import AnyApproach, AnyAttribution
from impactx.version import environment


class QualityResult(Result):
    """What the metrics say of a model's maps; see `evaluation.judgement.MapQuality`."""

    quality: Judgement

    def metrics(self) -> dict[str, float]:
        """See `Result.metrics`."""
        return self.quality.metrics()


class MapQuality(Step[QualityResult]):
    """The judgement of a final model's maps.

    Attributes:
        weights: Fingerprint of the model's weights.
        data, test: Fingerprints of the data set's contents and of its test part.
        evaluation: How models are judged.
        attribution: The experiment's; its maps of the model are judged.
        learned: The maps that the model was trained to predict, where it was; with their scale, and
            the split whose training part the scale is fitted on.
        learned_attribution: What made these.
        a: The A that the model was trained on, whose maps are judged as well.
        decoder_is_trained: Whether the model's own maps mean something: not after lambda = 0.
        checkpoint: The folder of the step that trained the model.
        approach: Whose model it is.
    """

    kind: ClassVar[str] = "map_quality"
    result_type: ClassVar[type[Result]] = QualityResult
    title: ClassVar[str] = "map quality"

    weights: str
    data: str
    test: str
    evaluation: EvaluationSettings
    attribution: AnyAttribution
    learned: MapsRef | None = None
    learned_scale: str | None = None
    learned_attribution: AnyAttribution | None = None
    split: SplitRecipe | None = None
    a: ModelRef | None = None
    decoder_is_trained: bool
    makes_maps: Annotated[bool, OUTSIDE_KEY]
    checkpoint: Annotated[str, OUTSIDE_KEY]
    approach: Annotated[AnyApproach, OUTSIDE_KEY]
    trained: Annotated[dict[str, Any], OUTSIDE_KEY]
    dataset: Annotated[DatasetSettings, OUTSIDE_KEY]

    @classmethod
    def of(cls, model: Model, result: TrainingResult, test: str, evaluation: EvaluationSettings,
           attribution: AnyAttribution) -> MapQuality:
        """Return the judgement of a trained model's maps.

        Args:
            model: The training; it must have left weights.
            result: What it left.
            test: Fingerprint of the test part.
            evaluation: How models are judged.
            attribution: The experiment's.
        """
        ref, learns = model.ref(result), model.maps is not None
        return cls(
            name=f"map quality of {model.name}", dataset_name=model.dataset_name,
            model_name=model.model_name, approach_name=model.approach_name, repeat=model.repeat,
            weights=ref.weights, data=model.data, test=test,
            evaluation=evaluation.model_copy(update={"approaches": None, "margin": 0.5}),
            attribution=attribution, learned=model.maps,
            learned_scale=model.map_scale if learns else None,
            learned_attribution=model.maps_attribution if learns else None,
            split=model.split if learns else None, a=model.classifier,
            decoder_is_trained=model.candidate.weight != 0,
            makes_maps=model.method.makes_maps, checkpoint=ref.folder,
            approach=model.approach, trained=model.parameters(), dataset=model.dataset)

    def code_roots(self) -> set[str]:
        """See `Step.code_roots`: network, metrics and attributions count."""
        parts = [self.approach, self.attribution, self.learned_attribution, self.dataset.source,
                 *self.evaluation.metrics, *self.evaluation.attributions]
        return super().code_roots() | {type(part).__module__ for part in parts if part is not None}

    def parameters(self) -> dict[str, Any]:
        """See `Step.parameters`: those of the training."""
        return dict(self.trained)

    def inputs(self) -> dict[str, str]:
        """See `Step.inputs`."""
        return {"model": self.checkpoint} | (
            {} if self.learned is None else {"maps": self.learned.folder}) | (
            {} if self.a is None else {"classifier": self.a.folder})

    def describe(self, result: QualityResult) -> str:
        """See `Step.describe`."""
        metrics = self.evaluation.metrics
        return result.quality.summary(metrics[0].metric) if metrics else "no metric is chosen"

    def files(self, place: Workplace, folder: Path, result: QualityResult | None) -> list[Path]:
        """See `Step.files`: the result, and the scores of each image."""
        files = super().files(place, folder, result)
        if result is None:
            return files
        storage = place.artifacts.storage
        quality = folder / "map_quality.json"
        quality.write_bytes(storage.read(f"{self.folder}/{RESULT}"))
        return [*files, quality, local_file(storage, f"{self.folder}/{MAP_SCORES}", folder)]

    def placeholder(self) -> QualityResult:
        """See `Step.placeholder`."""
        return QualityResult(seconds=0, quality=Judgement(
            images=0, seconds=0, seconds_per_map={}, evaluations_per_map={}, results={}))

    @property
    def orders(self) -> list[Order]:
        """The attributions' maps that are compared."""
        return orders_of(self.evaluation, self.attribution, learned=self.learned_attribution,
                         has_a=self.a is not None)

    def images_judged(self, test_images: int, classes: int) -> int:
        """Return how many of the test images are drawn: at least one of each class."""
        return max(min(self.evaluation.map_images, test_images), classes)

    def execute(self, context: Context) -> QualityResult:
        """Judge the maps; keep the result and, image by image, map_scores.npz.

        Raises:
            StepError: The maps cannot be made or judged.
            StoreError: The store is not the one that the step names.
        """
        place, artifacts = context.place, context.place.artifacts
        torch.set_num_threads(place.threads)
        keep_freed_memory()
        if (finished := artifacts.result(self)) is not None:
            return finished
        started = time.perf_counter()
        data = place.dataset(self.dataset, self.data, self.test)
        test = data.load_test()
        count = self.images_judged(len(test.labels), len(np.unique(test.labels)))
        rows = stratified_draw(test.labels, count, self.evaluation.seed)
        images = JudgedImages(rows, test.images[rows], np.asarray(test.labels[rows], np.int64))
        try:
            quality, arrays = judge(
                self._model(place, data), images, self.evaluation, self.attribution,
                device=torch.device(context.device), memory_bytes=place.memory_bytes)
        except MapQualityError as error:
            raise StepError(f"{self.name}: {error}") from error
        result = QualityResult(
            seconds=time.perf_counter() - started, quality=quality,
            environments=(environment(context.device, "float32", exact=True),))
        stream = io.BytesIO()
        # numpy's own type of this call allows booleans only.
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        artifacts.finish(self, result, {MAP_SCORES: stream.getvalue()})
        return result

    def _model(self, place: Workplace, data: Dataset) -> JudgedModel:
        network = place.checkpoint(self.checkpoint, self.weights).model
        classifier = open_model(StepSource(folder=self.checkpoint), place, self.weights)
        open_a = None if self.a is None else partial(
            open_model, StepSource(folder=self.a.folder), place, self.a.weights)
        return JudgedModel(network.eval().requires_grad_(False), classifier, open_a,
                           self._targets(place, data), self.decoder_is_trained)

    def _targets(self, place: Workplace, data: Dataset) -> Targets | None:
        """Return the maps that the model was trained to predict, or None."""
        if self.learned is None or self.split is None or self.learned_attribution is None:
            return None
        store = MapStore.open(place.artifacts.storage, self.learned.folder, self.learned.key)
        maps, scaling = place.map_array(store, data), self.learned_scale or "std"
        split = make_split(data.train.labels, self.split.fraction, class_names=data.class_names,
                           common_fraction=self.split.common_fraction, seed=self.split.seed)
        scale = map_scale(maps, split.train, scaling)
        mean, by_class = mean_maps(maps, data.train.labels, split.train, data.num_classes, scale)
        return Targets(
            self.learned_attribution, order_of_a(self.learned_attribution), scaling,
            None if isinstance(scale, np.ndarray) else scale, mean, by_class)


