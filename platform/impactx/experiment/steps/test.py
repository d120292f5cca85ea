"""The test: a final model reads the test images once."""

from __future__ import annotations

import io
import math
import time
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from impactx.datasets.batches import DeviceData
from impactx.datasets.entry import ImageSet
from impactx.experiment.artifacts import PREDICTIONS
from impactx.experiment.steps.base import OUTSIDE_KEY, Context, Result, Step, StepError
from impactx.experiment.steps.training import MapsRef, Model, ModelRef, TrainingResult
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import Attribution
from impactx.explain.maps.store import MapStore
from impactx.explain.weighted import explain_by_own_probabilities
from impactx.settings import DatasetSettings, TrainingSettings
from impactx.settings.extensions import AnyApproach, AnyAttribution
from impactx.version import environment


class TestResult(Result):
    """What a final model scored on the test images.

    Attributes:
        accuracy: Fraction in [0, 1]; standard_error: Of it, over images.
        images: How many there are.
        map_seconds: What a prediction costs beyond the network where it needs a map of its image,
            in seconds of one process; None where it needs none.
    """

    __test__ = False  # it is no test of pytest's

    accuracy: float
    images: int
    standard_error: float
    map_seconds: float | None = None

    def metrics(self) -> dict[str, float]:
        """See `Result.metrics`."""
        return {f"test_{name}": value for name, value in super().metrics().items()}


class Test(Step[TestResult]):
    """The one reading of the test set by a final model.

    Attributes:
        weights: Fingerprint of the model's weights.
        data, test: Fingerprints of the data set's contents and of its test part.
        maps: The store of the test images' maps, where the model must be given them.
        checkpoint: The folder of the step that trained the model.
        approach: Whose model it is.
        trained: What MLflow and the table show of that training.
    """

    __test__ = False

    kind: ClassVar[str] = "test"
    result_type: ClassVar[type[Result]] = TestResult
    title: ClassVar[str] = "tests"

    weights: str
    data: str
    test: str
    maps: MapsRef | None = None
    checkpoint: Annotated[str, OUTSIDE_KEY]
    approach: Annotated[AnyApproach, OUTSIDE_KEY]
    trained: Annotated[dict[str, Any], OUTSIDE_KEY]
    val_accuracy: Annotated[float | None, OUTSIDE_KEY]
    paper_accuracy: Annotated[float | None, OUTSIDE_KEY]
    dataset: Annotated[DatasetSettings, OUTSIDE_KEY]
    training: Annotated[TrainingSettings, OUTSIDE_KEY]
    attribution: Annotated[AnyAttribution, OUTSIDE_KEY]

    @classmethod
    def of(cls, model: Model, result: TrainingResult, test: str, paper: float | None) -> Test:
        """Return the test of a trained model.

        Args:
            model: The training; it must have left weights.
            result: What it left.
            test: Fingerprint of the test part.
            paper: The paper's accuracy as a fraction, where it may stand beside ours.
        """
        ref: ModelRef = model.ref(result)
        return cls(
            name=f"test of {model.name}", dataset_name=model.dataset_name,
            model_name=model.model_name, approach_name=model.approach_name, repeat=model.repeat,
            weights=ref.weights, data=model.data, test=test, maps=model.test_maps,
            checkpoint=ref.folder, approach=model.approach, trained=model.parameters(),
            val_accuracy=(result.best or {}).get("val_accuracy"), paper_accuracy=paper,
            dataset=model.dataset, training=model.training, attribution=model.maps_attribution)

    def code_roots(self) -> set[str]:
        """See `Step.code_roots`: weights do not say what their network does with images."""
        return super().code_roots() | {
            type(self.approach).__module__, type(self.dataset.source).__module__}

    def parameters(self) -> dict[str, Any]:
        """See `Step.parameters`: those of the training, so that one row of a table says all."""
        return dict(self.trained) | (
            {} if self.paper_accuracy is None else {"paper_accuracy": self.paper_accuracy})

    def inputs(self) -> dict[str, str]:
        """See `Step.inputs`."""
        return {"model": self.checkpoint} | (
            {} if self.maps is None else {"test_maps": self.maps.folder})

    def placeholder(self) -> TestResult:
        """See `Step.placeholder`."""
        return TestResult(seconds=0, accuracy=0, images=0, standard_error=0)

    def metrics(self, result: TestResult) -> dict[str, float]:
        """See `Step.metrics`; validation and the paper's accuracy stand beside the test's."""
        beside = {"best_val_accuracy": self.val_accuracy, "paper_accuracy": self.paper_accuracy}
        return result.metrics() | {k: v for k, v in beside.items() if v is not None}

    def describe(self, result: TestResult) -> str:
        """See `Step.describe`."""
        return f"test accuracy {result.accuracy:.4f} on {result.images} images"

    def execute(self, context: Context) -> TestResult:
        """Keep the accuracy and, image by image, the probabilities (predictions.npz).

        Raises:
            StepError: The model's scores are not finite.
            StoreError: The store is not the one that the step names.
        """
        place, artifacts = context.place, context.place.artifacts
        torch.set_num_threads(place.threads)
        if (finished := artifacts.result(self)) is not None:
            return finished
        started = time.perf_counter()
        data = place.dataset(self.dataset, self.data, self.test)
        test = data.load_test()
        # A module's own methods are not typed.
        model: Any = place.checkpoint(self.checkpoint, self.weights).model
        model = model.eval().to(context.device)
        store = None if self.maps is None else MapStore.open(
            artifacts.storage, self.maps.folder, self.maps.key)
        images = DeviceData(
            test.images, test.labels, np.arange(len(test.labels)), device=context.device,
            maps=None if store is None else place.map_array(store, data),
            memory_bytes=self.training.memory_mb * 2**20)
        parts = []
        with torch.no_grad():
            for batch in images.evaluation(batch_size=self.training.eval_batch_size):
                maps = () if batch.maps is None else (batch.maps,)
                parts.append(model.classify(batch.images, *maps).softmax(1).float().cpu().numpy())
        probabilities = np.concatenate(parts)
        if not np.isfinite(probabilities).all():
            raise StepError(f"{self.name}: the model gives scores that are not finite on test "
                            "images")
        hits = probabilities.argmax(1) == test.labels
        stream = io.BytesIO()
        np.savez_compressed(stream, labels=test.labels, probabilities=probabilities)
        seconds = time.perf_counter() - started
        is_double = next(model.parameters()).dtype == torch.float64
        accuracy = float(hits.mean())
        result = TestResult(
            accuracy=accuracy, images=len(hits), seconds=seconds,
            standard_error=math.sqrt(accuracy * (1 - accuracy) / len(hits)),
            environments=(environment(context.device, "float64" if is_double else "float32"),),
            map_seconds=None if store is None else self._seconds_of_a_map(
                model.a, test, place, context.device))
        artifacts.finish(self, result, {PREDICTIONS: stream.getvalue()})
        return result

    def _seconds_of_a_map(self, a: torch.nn.Module, test: ImageSet, place: Workplace,
                          device: torch.device | str) -> float:
        """What one process needs for a class-weighted map, in seconds.

        Of eight images at once, or of one where that is slow already.
        """
        if not isinstance(self.attribution, Attribution):
            raise StepError(f"{self.name}: {self.attribution.method} makes no maps")
        seconds = math.inf
        # The first image brings the model into its fastest form.
        for images in (test.images[:1], test.images[:8]):
            started = time.perf_counter()
            explain_by_own_probabilities(self.attribution, a, images, device=device,
                                         memory_bytes=place.memory_bytes)
            seconds = (time.perf_counter() - started) / len(images)
            if seconds > 2:
                break
        return seconds
