"""A user's own metric of maps, written outside the package: from the settings to the report."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from impactx import plugins
from impactx.configuration import load_settings
from impactx.evaluation.judgement import MapQuality
from impactx.experiment.preparation import prepare
from impactx.report.build import build_report
from impactx.results.export import JobExport, export_job, map_scores
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.settings import EvaluationSettings
from impactx.settings.extensions import map_metric

ROOT = Path(__file__).resolve().parents[2]
FILE = str(ROOT / "tests" / "extensions" / "toy_metric.py")
TINY = ("approach=[impactx]", "datasets.digits.subset=60", "grid.learning_rate=[0.004]", "grid.batch_size=[16]",
        "grid.validation_fraction=[0.2]", "training.epochs=2", "attribution.max_evals=20",
        "approaches.impactx.lambdas=[0.8]", "repeats=2", "evaluation.map_images=10", "evaluation.resamples=100")


@pytest.fixture(scope="module")
def toy():
    """The module, registered while these tests run: no other test finds it."""
    map_metric.names()
    held = dict(map_metric._classes)
    plugins.load([FILE])
    yield sys.modules["toy_metric"]
    map_metric._classes = held
    del sys.modules["toy_metric"]


def run(folder: Path, metrics: str) -> tuple[Job, JobExport, dict[str, bytes]]:
    settings = load_settings("demo", [*TINY, f"plugins=[{FILE}]", f"evaluation.metrics={metrics}", f"output={folder}",
                                      f"cache={folder}/cache", f"data_root={folder}"], ROOT / "configs")
    prepared = prepare(settings)
    job = Job(settings, prepared.cells, prepared.place, LocalExecutor(prepared.place, NoTracker()), NoTracker())
    job.run()
    job.check()
    export = export_job(prepared.place.artifacts.storage, job.key)
    return job, export, build_report(export, lambda folder: map_scores(prepared.place.artifacts.storage, folder))


def test_it_is_found_by_its_name_and_has_settings(toy):
    assert map_metric.names() == ["fidelity", "morf", "sparseness"]
    chosen = EvaluationSettings.model_validate({"metrics": ["sparseness", {"metric": "sparseness", "power": 2}][1:]})
    assert chosen.metrics[0].power == 2 and isinstance(chosen.metrics[0], toy.Sparseness)
    plain = chosen.model_dump(mode="json")
    assert plain["metrics"] == [{"metric": "sparseness", "power": 2.0}]
    assert EvaluationSettings.model_validate(plain) == chosen


def test_the_index_is_that_of_its_formula(toy):
    maps = np.random.default_rng(0).normal(size=(3, 1, 4, 5))
    for value, one in zip(toy.Sparseness().gini(maps), np.abs(maps).reshape(3, -1), strict=True):
        assert value == pytest.approx(np.abs(one[:, None] - one).sum() / (2 * len(one) * one.sum()))
    assert np.isnan(toy.Sparseness().gini(np.zeros((1, 1, 2, 2)))).all()


@pytest.mark.parametrize("metrics", ["[morf, fidelity, sparseness]", "[{metric: sparseness}]"])
def test_its_values_are_in_the_result_the_table_of_runs_and_the_report(toy, tmp_path, metrics):
    _, export, files = run(tmp_path, metrics)
    entry = next(a for a in export.evidence.cells[0].approaches if a.approach == "impactx")
    quality = entry.map_quality
    orders = {"decoder", "shap_predicted", "shap_true", "shap_of_a", "mean_map"}
    alone = "morf" not in metrics
    for one in quality:
        assert one.results.keys() == ({"sparseness"} if alone else {"morf", "fidelity", "sparseness"})
        values = one.results["sparseness"].values
        assert values.keys() == orders and all(0 < v["gini"].low <= v["gini"].mean <= v["gini"].high < 1
                                               for v in values.values())
        assert one.metrics()["sparseness_gini_decoder"] == values["decoder"]["gini"].mean
        assert ("morf_aopc_decoder" in one.metrics()) != alone
        assert MapQuality.model_validate(one.model_dump(mode="json")) == one
    # Over both repeats, in a table of its own on the page.
    joint = entry.maps.metrics["sparseness"]["decoder"]["gini"]
    assert joint.mean == pytest.approx(np.mean([q.results["sparseness"].values["decoder"]["gini"].mean
                                                   for q in quality]))
    assert joint.over == "repeats and images"
    rows = list(csv.DictReader(io.StringIO(files["map-quality-digits-lenet5-impactx.csv"].decode())))
    assert len(rows) == 5 and {row["metric"] for row in rows} == {"sparseness"}
    own = next(row for row in rows if row["order"] == "IMPACTX's own map")
    assert (own["value"], float(own["mean"])) == ("gini", pytest.approx(joint.mean, abs=1e-3))
    assert own["interval"] == f"[{joint.low:.3f}, {joint.high:.3f}]"
    assert own["mean"] in re.sub(r"<[^>]*>", " ", files["report.html"].decode())
    assert ("morf-digits-lenet5-impactx.csv" in files) != alone


def test_a_result_whose_metric_is_not_there_is_read_as_a_plain_one():
    data = {"images": 1, "seconds": 1.0, "seconds_per_map": {}, "evaluations_per_map": {}, "results": {
        "elsewhere": {"metric": "elsewhere", "further": 3, "values": {
            "decoder": {"v": {"mean": 1.0, "low": 0.5, "high": 1.5, "images": 1}}}}}}
    quality = MapQuality.model_validate(data)
    assert quality.metrics() == {"elsewhere_v_decoder": 1.0, "map_images": 1.0}
    assert quality.summary("elsewhere") == "decoder 1.000"
