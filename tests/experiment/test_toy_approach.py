"""An approach in a file outside the package goes through a whole experiment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import impactx
from impactx import plugins
from impactx.configuration import ConfigurationError, load_settings
from impactx.costs.dry_run import dry_run
from impactx.experiment.preparation import prepare
from impactx.results.evidence import roles
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.settings.extensions import approach

ROOT = Path(__file__).resolve().parents[2]
FILE = str(ROOT / "tests" / "extensions" / "toy_approach.py")
TINY = ("approach=[]", "datasets.digits.subset=80", "grid.learning_rate=[0.004]", "grid.batch_size=[16]",
        "grid.validation_fraction=[0.2]", "training.epochs=2", "repeats=1", "evaluation.map_images=0",
        "approaches.smoothed={kind: label_smoothing, smoothing: 0.2}")


@pytest.fixture(scope="module")
def toy():
    plugins.load([FILE])
    yield sys.modules["toy_approach"]
    del approach._classes["label_smoothing"], sys.modules["toy_approach"]


def settings_of(*overrides):
    return load_settings("demo", [*TINY, f"plugins=[{FILE}]", *overrides], ROOT / "configs")


def test_it_is_known_by_its_name_and_its_settings_are_checked(toy):
    assert "label_smoothing" in approach.names()
    smoothed = settings_of().approaches["smoothed"]
    assert isinstance(smoothed, toy.LabelSmoothing) and smoothed.smoothing == 0.2
    assert smoothed.described() == {"kind": "label_smoothing", "smoothing": 0.2}
    with pytest.raises(ConfigurationError) as caught:
        settings_of("approaches.smoothed.smoothing=2", "approaches.smoothed.smooothing=0.1", "approaches.b.latent=0",
                    "approaches.c.kind=label_smooting", "approaches.d.kind=baseline")
    text = str(caught.value)
    assert "approaches.smoothed.smoothing = 2: input should be less than 1" in text
    assert "approaches.smoothed.smooothing = 0.1: no such setting with kind label_smoothing; did you mean 'smoothing'?" in text
    assert "approaches.b.latent = 0: input should be greater than or equal to 1" in text  # no kind: impactx
    assert ("approaches.c.kind = 'label_smooting': no such approach; did you mean 'label_smoothing'? there are abn, "
            "baseline, ensemble") in text
    with pytest.raises(ConfigurationError, match="'baseline' is A itself"):
        settings_of("approaches.d.kind=baseline")


def test_it_is_searched_trained_tested_and_loaded(toy, tmp_path):
    settings = settings_of(f"output={tmp_path / 'out'}", f"cache={tmp_path}", f"data_root={tmp_path}")
    assert "smoothed: 2" in dry_run(settings)
    prepared = prepare(settings)
    job = Job(settings, prepared.cells, prepared.place, LocalExecutor(prepared.place, NoTracker()), NoTracker())
    baseline, row = job.run()
    assert (baseline.approach, row.approach, row.epochs) == ("baseline", "smoothed", 2)
    assert row.learning_rate in (0.002, 0.004) and row.weight is None
    names = {path.parent.name for path in Path(settings.output).glob("trials/*/result.json")}
    assert len(names) == 3  # A's grid has one point, the approach two candidates
    role = roles(settings)["smoothed"]
    assert (role.kind, role.candidates) == ("other", 2)
    model = impactx.load_model(Path(row.checkpoint, "checkpoint.pt"))
    assert isinstance(model.approach, toy.LabelSmoothing) and model.approach.smoothing == 0.2
    test = prepared.place.dataset(settings.datasets["digits"]).load_test()
    assert np.mean(model.predict(test.images).labels == test.labels) == pytest.approx(row.test_accuracy)
