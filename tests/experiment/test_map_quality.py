"""The judgement of maps in a whole small experiment: which maps, on which images, against sequential recomputation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from impactx.approaches.checkpoint import load_checkpoint
from impactx.configuration import ConfigurationError, load_settings
from impactx.costs.count import count
from impactx.costs.judging import passes_of
from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.metrics import morf
from impactx.experiment.artifacts import MAP_SCORES
from impactx.experiment.preparation import prepare
from impactx.experiment.steps.quality import MapQuality as MapQualityStep
from impactx.explain.maps.store import MapStore
from impactx.results.evidence_records import Evidence
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoRun, NoTracker

pytest.importorskip("captum")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "reference"))
from morf_twin import slow_aopc, slow_curves  # noqa: E402

TINY = ("approach=[impactx,lambda0,abn,wae]", "approaches.abn.learning_rate_factors=[1.0]",
        "datasets.digits.subset=100", "grid.learning_rate=[0.004]", "grid.batch_size=[16]",
        "grid.validation_fraction=[0.2]", "training.epochs=2", "attribution.max_evals=60", "maps.shard_size=60",
        "approaches.impactx.lambdas=[0.8]", "approaches.lambda0.learning_rate_factors=[1.0]", "repeats=1",
        "evaluation.map_images=14", "evaluation.resamples=100",
        "evaluation.attributions=[{method: grad_cam}]")
IMAGES = 14


class Notes(NoTracker):
    """Keeps the metrics and artifacts of each run, by its name."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, float]] = {}
        self.artifacts: dict[str, list[str]] = {}

    def run(self, identity):
        notes, name = self, identity.name

        class Run(NoRun):
            def log_metrics(self, metrics, step=None):
                notes.metrics.setdefault(name, {}).update(metrics)

            def log_text(self, text, path):
                notes.artifacts.setdefault(name, []).append(path)

            def log_file(self, local_path, folder=""):
                assert Path(local_path).is_file()
                notes.artifacts.setdefault(name, []).append(Path(local_path).name)

        return Run()


class Done:
    def __init__(self, output, shared, *overrides) -> None:
        settings = load_settings("demo", [*TINY, f"output={output}", f"cache={shared}", f"data_root={shared}",
                                          *overrides], ROOT / "configs")
        prepared, self.notes = prepare(settings), Notes()
        self.place, self.cell = prepared.place, prepared.cells[0]
        self.job = Job(settings, prepared.cells, self.place, LocalExecutor(self.place, self.notes), self.notes)
        self.rows = {row.approach: row for row in self.job.run()}
        self.data = self.place.dataset(self.cell.dataset)
        self.test = self.data.load_test()
        self.attribution = settings.attribution

    def result(self, approach):
        return self.kept(approach)["quality"]

    def kept(self, approach):
        return json.loads(Path(self.place.output, self.rows[approach].map_quality, "result.json").read_text())

    def arrays(self, approach):
        with np.load(Path(self.place.output, self.rows[approach].map_quality, MAP_SCORES)) as held:
            return dict(held)

    def model(self, approach):
        return load_checkpoint(Path(self.rows[approach].checkpoint, "checkpoint.pt")).model

    def pixels(self, rows):
        return torch.from_numpy(np.array(self.test.images[rows])).permute(0, 3, 1, 2).float() / 255


def morf_of(result):
    return result["results"]["morf"]


def orders(result):
    return morf_of(result)["values"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def done(tmp_path_factory, shared) -> Done:
    return Done(tmp_path_factory.mktemp("output"), shared)


def test_each_model_is_judged_by_the_maps_that_it_has(done):
    both = ["random", "least_relevant_first", "shap_predicted", "shap_true", "grad_cam_predicted"]
    assert set(orders(done.result("baseline"))) == set(both)
    assert set(orders(done.result("impactx"))) == set(both) | {"decoder", "shap_of_a", "mean_map"}
    assert set(orders(done.result("abn"))) == set(both) | {"attention"} and "fidelity" not in done.result("abn")["results"]
    # With lambda = 0 nothing teaches the decoder: what it makes is no explanation.
    assert set(orders(done.result("lambda0"))) == set(both) | {"shap_of_a", "mean_map"}
    assert "fidelity" not in done.result("lambda0")["results"]
    # WAE must be given a map of the image: it has no score of the image alone.
    assert done.rows["wae"].map_quality is None
    for approach in done.rows.keys() - {"wae"}:
        result, arrays = done.result(approach), done.arrays(approach)
        grid = morf_of(result)
        assert (result["images"], grid["region"], grid["regions"], grid["early_regions"]) == (IMAGES, 4, 64, 10)
        # The same images for all, every class among them.
        assert np.array_equal(arrays["rows"], done.arrays("baseline")["rows"])
        assert np.array_equal(np.unique(arrays["labels"]), np.arange(10)) and len(np.unique(arrays["rows"])) == IMAGES
        assert np.array_equal(arrays["labels"], done.test.labels[arrays["rows"]])
        assert result["seconds_per_map"].keys() == result["evaluations_per_map"].keys()
    result = done.result("impactx")
    assert (result["evaluations_per_map"]["decoder"], result["evaluations_per_map"]["shap_true"]) == (1, 60)
    assert 0 < result["seconds_per_map"]["decoder"] < result["seconds_per_map"]["shap_predicted"]


def test_the_plan_counts_what_is_judged(done):
    counted = count(done.cell, done.place.artifacts)
    assert len(counted.groups) > 4 and not any(group.left for group in counted.groups)
    judged = counted.steps(MapQualityStep)
    assert {step.approach_name for step in judged} == done.rows.keys() - {"wae"}
    for step in judged:
        quality, passes = done.place.artifacts.result(step).quality, passes_of(step, done.cell)
        assert passes.images == quality.images
        assert passes.metrics.most == IMAGES * (1 + 64 * len(quality.results["morf"].values))
        own = {"decoder", "attention"}
        assert sorted(each.most for each in passes.maps) == sorted(
            IMAGES * each for name, each in quality.evaluations_per_map.items() if name not in own)


@pytest.mark.parametrize("approach, order", [
    ("impactx", "decoder"), ("abn", "attention"), ("baseline", "shap_predicted")])
def test_curves_are_those_of_the_kept_model(done, approach, order):
    """One image after the other, by the checkpoint alone."""
    arrays, model = done.arrays(approach), done.model(approach)
    i = 0
    place = int(arrays["shown"][i])
    row = arrays["rows"][[place]]
    x, noise = done.pixels(row), morf.noise_of(row, (3, 32, 32), 0)
    if approach != "baseline":
        own = model.with_maps(x)[1].detach().numpy()
    else:
        own = done.attribution.explain(model, done.test.images[row], arrays["predicted"][[place]], indices=row).maps
    np.testing.assert_allclose(arrays[f"maps.{order}"][i], own[0], atol=1e-5)
    score = model.classify
    probability, logit, predicted, _ = slow_curves(score, x[0].numpy(), noise[0], arrays[f"maps.{order}"][i], 4)
    assert predicted == arrays["predicted"][place]
    np.testing.assert_allclose(arrays[f"curve.{order}"][place], probability, atol=1e-5)
    assert arrays[f"aopc.{order}.probability.early"][place] == pytest.approx(slow_aopc(probability, 10), abs=1e-5)
    assert arrays[f"aopc.{order}.logit.all"][place] == pytest.approx(slow_aopc(logit, 64), abs=1e-4)


def test_maps_for_the_true_class_are_made_anew_only_where_the_prediction_is_wrong(done):
    arrays, model = done.arrays("baseline"), done.model("baseline")
    shown = arrays["shown"]
    wrong = arrays["predicted"][shown] != arrays["labels"][shown]
    assert wrong.any() and not wrong.all()
    same = [np.array_equal(a, b) for a, b in zip(arrays["maps.shap_true"], arrays["maps.shap_predicted"], strict=True)]
    assert same == (~wrong).tolist()
    rows = arrays["rows"][shown]
    expected = done.attribution.explain(model, done.test.images[rows], done.test.labels[rows], indices=rows).maps
    np.testing.assert_allclose(arrays["maps.shap_true"], expected, atol=1e-5)


def test_summaries_are_means_of_the_images_and_pairs_are_differences(done):
    result, arrays = done.result("impactx"), done.arrays("impactx")
    for name, order in orders(result).items():
        curve = morf_of(result)["curves"][name]
        assert curve["probability"]["mean"] == pytest.approx(arrays[f"curve.{name}"].mean(0).tolist(), abs=1e-6)
        assert all(lo <= mean <= hi for lo, mean, hi in zip(*(curve["logit"][k] for k in ("low", "mean", "high")),
                                                            strict=True))
        mine = arrays[f"aopc.{name}.logit.early"]
        assert order["aopc_logit"]["mean"] == pytest.approx(mine.mean())
        if name != "random":
            difference = (mine - arrays["aopc.random.logit.early"]).mean()
            assert order["aopc_logit_over_random"]["mean"] == pytest.approx(difference)
    assert "aopc_over_shap_predicted" in orders(result)["decoder"]
    assert "aopc_over_shap_predicted" not in orders(result)["shap_predicted"]
    # Of the decoder's map every region differs; a map of 60 evaluations has few values.
    ties = morf_of(result)["ties"]
    assert ties["decoder"]["images"] == 0 and ties["shap_predicted"]["regions"] > 10


def test_fidelity_is_that_of_the_kept_decoder(done):
    result, arrays = done.result("impactx"), done.arrays("impactx")
    assert result["results"]["fidelity"]["target"] == "shap_of_a" and "fidelity" not in done.result("baseline")["results"]
    assert len(list(Path(done.place.output, "maps").glob("*/result.json"))) == 3  # and WAE's
    store = MapStore.open(done.place.artifacts.storage, f"maps/{done.kept('impactx')['recipe']['learned']['key']}")
    maps = np.array(done.place.map_array(store, done.data), np.float64)
    from impactx.datasets import make_split

    train = make_split(done.data.train.labels, 0.2, common_fraction=0.2, seed=0).train
    scale = 1 / maps[train].std()
    rows = arrays["rows"]
    of_a = done.attribution.explain(done.model("baseline"), done.test.images[rows], done.test.labels[rows],
                                    indices=rows).maps * scale
    decoded = done.model("impactx").with_maps(done.pixels(rows))[1].detach().numpy()
    predictors = result["results"]["fidelity"]["values"]
    assert predictors["decoder"]["mse"]["mean"] == pytest.approx(((decoded - of_a) ** 2).mean(), rel=1e-4)
    mean = maps[train].mean(0) * scale
    assert predictors["mean_map"]["mse"]["mean"] == pytest.approx(((mean - of_a) ** 2).mean(), rel=1e-4)
    labels = done.data.train.labels[train]
    for name, classes in (("true", arrays["labels"]), ("predicted", arrays["predicted"])):
        by_class = np.stack([maps[train][labels == k].mean(0) * scale for k in classes])
        expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(by_class, of_a, strict=True)]
        np.testing.assert_allclose(arrays[f"fidelity.class_mean_of_{name}.correlation"], expected, rtol=1e-4)
    assert predictors["random_decoder"]["mse"]["mean"] != predictors["decoder"]["mse"]["mean"]
    assert all(p["overlap"]["images"] == IMAGES for p in predictors.values())


def test_the_tracker_has_the_numbers_and_the_evidence_the_results(done):
    name = next(n for n in done.notes.metrics if n.startswith("map quality of impactx"))
    result = done.result("impactx")
    assert done.notes.metrics[name] == MapQuality.model_validate(result).metrics()
    assert done.notes.metrics[name]["morf_aopc_decoder"] == morf_of(result)["values"]["decoder"]["aopc"]["mean"]
    assert {"map_quality.json", "map_scores.npz"} <= set(done.notes.artifacts[name])
    entry = next(a for a in done.job.evidence.cells[0].approaches if a.approach == "impactx")
    assert entry.map_quality == [MapQuality.model_validate(result)] and entry.map_quality[0].model_dump(mode="json") == result
    assert entry.maps.explainer == "shap_predicted"
    assert entry.maps.orders["decoder"].aopc.mean == pytest.approx(done.notes.metrics[name][
        "morf_aopc_decoder"])
    assert entry.maps.fidelity["mean_map"]["mse"].mean == pytest.approx(
        result["results"]["fidelity"]["values"]["mean_map"]["mse"]["mean"])
    kept = Path(done.place.output, "jobs", done.job.key, "evidence.json")
    assert json.loads(kept.read_text()) == done.job.evidence.as_json()
    assert Evidence.from_json(json.loads(kept.read_text())) == done.job.evidence


def test_the_same_again_reuses_and_other_choices_do_not(done, shared):
    again = Done(done.place.output, shared)
    names = {name for name in done.notes.metrics if name.startswith("map quality")}
    assert len(names) == 4 and not names & again.notes.artifacts.keys() and again.rows == done.rows
    assert all(again.notes.metrics[name] == done.notes.metrics[name] for name in names)
    other = Done(done.place.output, shared, "evaluation.map_images=0")
    assert {row.map_quality for row in other.rows.values()} == {None}
    own = Done(done.place.output, shared, "evaluation.orders=[own]", "evaluation.attributions=[]",
               "evaluation.approaches=[impactx]", "evaluation.metrics=[{metric: morf, region: 8}, fidelity]")
    assert own.rows["baseline"].map_quality is None
    found = own.result("impactx")
    assert set(orders(found)) == {"decoder", "random", "least_relevant_first"} and morf_of(found)["regions"] == 16
    assert "fidelity" not in found["results"] and set(own.arrays("impactx")) >= {"curve.decoder"}


def test_impossible_choices_are_errors(shared, tmp_path):
    with pytest.raises(ConfigurationError, match=r"evaluation.approaches = \['ensemble'\]: no such approach"):
        Done(tmp_path, shared, "evaluation.approaches=[ensemble]")
    with pytest.raises(ConfigurationError, match="evaluation.metrics: morf: region = 33: .*32x32.*digits"):
        Done(tmp_path, shared, "evaluation.metrics=[{metric: morf, region: 33}]")
    with pytest.raises(ConfigurationError, match="evaluation.attributions"):
        Done(tmp_path, shared, "evaluation.attributions=[{method: occlusion, window: 40}]")
