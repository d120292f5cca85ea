"""What a metric of maps is given and may return; whole judgements stand in tests/experiment/test_map_quality.py."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from impactx.evaluation.judgement import JudgedImages, JudgedModel, MapQualityError, judge
from impactx.evaluation.quality import MapMetric, Measurement, MetricResult, metrics_of
from impactx.explain.methods.occlusion import Occlusion
from impactx.settings import EvaluationSettings
from impactx.settings.extensions import MapMetricSettings


class Some(MapMetric):
    """Values of which some images have none, under any name."""

    metric: Literal["some"] = "some"
    array: str = "some.random.v"
    refuses: bool = False

    def measure(self, subject):
        if self.refuses:
            raise ValueError("there is nothing to see")
        values = np.where(subject.labels == 0, np.nan, subject.labels.astype(float))
        scores = {"random": {"v": values, "none": np.full(len(values), np.nan)}}
        return Measurement(self.measurement(subject, scores).result, {self.array: values})


def judged(**settings):
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    return judge(JudgedModel(classifier, classifier), JudgedImages(np.arange(8), images, np.arange(8) % 4),
                 EvaluationSettings(orders=[], resamples=100, metrics=[Some(**settings)]),
                 Occlusion(), device=torch.device("cpu"), memory_bytes=2**20)


def test_an_image_without_a_value_is_left_out_and_kept_as_such():
    quality, arrays = judged()
    values = quality.results["some"].values["random"]
    assert (values["v"].mean, values["v"].images) == (2.0, 6) and 1 <= values["v"].low < 2 < values["v"].high <= 3
    assert (values["none"].mean, values["none"].images) == (None, 0)
    assert quality.metrics() == {"some_v_random": 2.0, "map_images": 8.0}
    assert np.isnan(arrays["some.random.v"]).tolist() == [True, False, False, False] * 2
    assert set(arrays) == {"rows", "labels", "predicted", "shown", "images", "some.random.v"}


def test_what_a_metric_must_not_do_is_said():
    with pytest.raises(MapQualityError, match="the metric some returns arrays named labels, which exist already"):
        judged(array="labels")
    with pytest.raises(MapQualityError, match="the metric some: there is nothing to see"):
        judged(refuses=True)

    class Bare(MapMetricSettings):
        metric: Literal["bare"] = "bare"

    with pytest.raises(TypeError, match="Bare: a metric of maps extends impactx.evaluation.quality.MapMetric"):
        metrics_of(EvaluationSettings(metrics=[Bare()]))


def test_a_metric_says_nothing_of_costs_and_sizes_unless_it_does():
    assert Some().evaluations((8, 8), 3) == 0 and Some().check((8, 8)) is None and Some.result is MetricResult
    morf, _ = metrics_of(EvaluationSettings())
    assert morf.evaluations((32, 32), 3) == 1 + 64 * 5 and morf.evaluations((32, 32), 0) == 1 + 64
