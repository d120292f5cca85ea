"""Every approach through a whole experiment in this process, and what is refused before one starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import impactx
from impactx.approaches.abn import AbnNetwork
from impactx.approaches.checkpoint import load_checkpoint
from impactx.approaches.ensemble import EnsembleNetwork
from impactx.approaches.impactx import ImpactxNetwork
from impactx.approaches.single_stage import SingleStageNetwork
from impactx.approaches.wae import WaeNetwork
from impactx.configuration import ConfigurationError, load_settings
from impactx.costs.dry_run import dry_run
from impactx.experiment.cell import Configuration
from impactx.experiment.model_source import CheckpointSource, open_source
from impactx.experiment.paper import paper_accuracy
from impactx.experiment.preparation import prepare
from impactx.experiment.steps.base import StepError
from impactx.explain.maps.store import MapStore
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker

pytest.importorskip("captum")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = ["impactx", "lambda0", "shuffled", "shuffled_in_class", "mean_map", "class_mean_map", "integrated_gradients",
         "ensemble", "abn", "wae", "single_stage"]
TINY = (f"approach=[{','.join(NAMES)}]", "datasets.digits.subset=80", "grid.learning_rate=[0.004]",
        "grid.batch_size=[16]", "grid.validation_fraction=[0.2]", "training.epochs=2", "attribution.max_evals=12",
        "attribution.fixed_context=1", "maps.shard_size=50", "approaches.impactx.lambdas=[0.8]", "repeats=1",
        "approaches.shuffled.lambdas=[0.8]", "approaches.lambda0.learning_rate_factors=[1.0]",
        "approaches.integrated_gradients.attribution.steps=2", "approaches.abn.learning_rate_factors=[0.5,1.0]",
        "evaluation.map_images=0")


class Recorder(LocalExecutor):
    """Writes down what is worked on; dies when the step of a name has trained an epoch."""

    done: list[str]
    stop_at = ""

    def train(self, task, on_epoch):
        def watched(step, row):
            on_epoch(step, row)
            if step.name == self.stop_at:
                raise KeyboardInterrupt

        self.done.append(task.step.name)
        return super().train(task, watched)

    def explain(self, task, on_shards):
        self.done.append(task.step.name)
        return super().explain(task, on_shards)

    def process(self, task):
        self.done.append(task.step.name)
        return super().process(task)


def experiment(output: Path, shared: Path, *overrides: str, stop_at: str = ""):
    settings = load_settings("demo", [*TINY, f"output={output}", f"cache={shared}", f"data_root={shared}", *overrides],
                             CONFIGS)
    prepared = prepare(settings)
    executor = Recorder(prepared.place, NoTracker())
    executor.done, executor.stop_at = [], stop_at
    return Job(settings, prepared.cells, prepared.place, executor, NoTracker()), executor


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def first(tmp_path_factory, shared):
    """An undisturbed run: its rows by approach, its job and what was worked on."""
    job, executor = experiment(tmp_path_factory.mktemp("first"), shared)
    return {row.approach: row for row in job.run()}, job, executor.done


def same(rows):
    return {k: replace(r, train_seconds=0, map_seconds=None, seconds_in_all=None, checkpoint=Path(r.checkpoint).name)
            for k, r in rows.items()}


def loaded(row):
    return load_checkpoint(Path(row.checkpoint, "checkpoint.pt"))


def test_every_approach_comes_to_its_row(first):
    rows, _, done = first
    assert list(rows) == ["baseline", *NAMES]
    assert done[:6] == ["A lr=0.004 bs=16 vf=0.2", "A repeat 0", "maps repeat 0",
                        "maps by integrated_gradients repeat 0", "class-weighted maps repeat 0",
                        "class-weighted maps of test images repeat 0"]
    assert done[6:8] == ["abn rate x0.5", "abn"]  # the only search: the others have one candidate
    assert sum(name.startswith("test of") for name in done) == 12 == len({name for name in done if "test of" in name
                                                                         and "maps" not in name})
    assert rows["abn"].learning_rate in (0.002, 0.004) and rows["shuffled"].weight == 0.8
    assert rows["wae"].weight is rows["ensemble"].weight is None and rows["lambda0"].weight == 0
    assert rows["wae"].map_seconds > 0 and {r.map_seconds for k, r in rows.items() if k != "wae"} == {None}
    assert all(0 <= r.test_accuracy <= 1 and r.epochs == 2 for r in rows.values())


def test_every_final_model_is_kept_as_what_it_is(first):
    rows, _, _ = first
    kinds = {name: type(loaded(rows[name]).model) for name in rows if name != "baseline"}
    assert kinds == dict.fromkeys(NAMES[:7], ImpactxNetwork) | {
        "ensemble": EnsembleNetwork, "abn": AbnNetwork, "wae": WaeNetwork, "single_stage": SingleStageNetwork}
    assert {name: loaded(row).weight for name, row in rows.items()} == {name: row.weight for name, row in rows.items()}
    assert loaded(rows["wae"]).approach.attribution.max_evals == 12
    single = loaded(rows["single_stage"])
    factor = float(single.model.factor)  # 0 where the best epoch is one that had no maps
    assert single.map_scale == (pytest.approx(1 / factor) if factor else None)


def test_the_library_predicts_what_the_test_saw(first):
    """WAE's maps are computed anew there, in other groups: its probabilities agree within rounding.

    lambda0's decoder learned nothing: it has no maps.
    """
    rows, job, _ = first
    data = job.place.dataset(job.cells[0].dataset)
    test = data.load_test()
    for name, row in rows.items():
        found = impactx.load_model(Path(row.checkpoint, "checkpoint.pt")).predict(test.images)
        assert (found.labels == test.labels).mean() == pytest.approx(row.test_accuracy, abs=0.003), name
        maps = {"baseline": None, "ensemble": None, "lambda0": None, "abn": (1, 32, 32)}.get(name, (3, 32, 32))
        assert (found.maps if maps is None else found.maps.shape[1:]) == maps
        assert np.isfinite(found.probabilities).all()


def test_controls_are_taught_other_maps_and_nothing_else_differs(first):
    rows, job, _ = first
    recipes = {name: json.loads(Path(rows[name].checkpoint, "result.json").read_text())["recipe"] for name in NAMES[:7]}
    assert recipes["impactx"]["approach"].pop("maps") == "own"
    for name, how in [("shuffled", "shuffled"), ("shuffled_in_class", "shuffled_in_class"), ("mean_map", "mean"),
                      ("class_mean_map", "class_mean")]:
        assert recipes[name]["approach"].pop("maps") == how and recipes[name] == recipes["impactx"]
    other = recipes["integrated_gradients"]
    assert other["approach"].pop("maps") == "own"
    assert other.pop("maps") != recipes["impactx"]["maps"]
    assert other == {k: v for k, v in recipes["impactx"].items() if k != "maps"}
    losses = {name: json.loads(Path(rows[name].checkpoint, "result.json").read_text())["history"][0]["train_mse"]
              for name in NAMES[2:7]}
    assert len(set(losses.values())) == 5


def test_the_ensembles_validation_accuracy_is_its_own(first):
    rows, job, _ = first
    result = json.loads(Path(rows["ensemble"].checkpoint, "result.json").read_text())
    net, data = loaded(rows["ensemble"]).model, job.place.dataset(job.cells[0].dataset)
    rows_of = job.cells[0].classifier(Configuration(0.004, 16, 0.2), 0).split_of(data).validation
    with torch.no_grad():
        scores = net(torch.from_numpy(data.train.images[rows_of]).permute(0, 3, 1, 2) / 255)
    accuracy = (scores.argmax(1).numpy() == data.train.labels[rows_of]).mean()
    assert rows["ensemble"].val_accuracy == result["best"]["val_accuracy"] == pytest.approx(accuracy)
    assert result["extra"]["second_val_accuracy"] == result["history"][result["best_epoch"] - 1]["val_accuracy"]
    first_a = loaded(rows["baseline"]).model.state_dict()
    assert all(torch.equal(t, net.members[0].state_dict()[n]) for n, t in first_a.items())
    assert not torch.equal(first_a["trunk.conv1.weight"], net.members[1].state_dict()["trunk.conv1.weight"])


def test_waes_stores_hold_the_maps_of_both_parts(first):
    _, job, _ = first
    data = job.place.dataset(job.cells[0].dataset)
    found = {}
    for folder in Path(job.place.output, "maps").iterdir():
        store = MapStore.open(job.place.artifacts.storage, f"maps/{folder.name}")
        found[store.spec.recipe.get("target", "label"), store.spec.recipe.get("part", "train"),
              store.spec.recipe["attribution"]["method"]] = store
        assert store.verify() == []
    assert set(found) == {("label", "train", "partition"), ("label", "train", "integrated_gradients"),
                          ("class_weighted", "train", "partition"), ("class_weighted", "test", "partition")}
    assert found["class_weighted", "test", "partition"].spec.images == len(data.load_test())
    scores = found["class_weighted", "train", "partition"].read_shard(0)["score"].to_numpy()
    labels = found["label", "train", "partition"].read_shard(0)["score"].to_numpy()
    assert not np.allclose(scores, labels)  # of all classes, not of the true one


def test_a_second_run_computes_nothing_and_a_dry_run_knows_it(first, shared):
    rows, job, _ = first
    again, executor = experiment(Path(job.place.output), shared)
    assert same({r.approach: r for r in again.run()}) == same(rows) and executor.done == []
    text = dry_run(again.settings)
    for said in ("3 trials and 12 final trainings", "4 stores of 599 maps in all",
                 "single_stage: explains itself, at most 80 maps a training", "stage 2 of abn: 2 trials, at most 4 epochs; 2 finished",
                 "stage 1: 1 trials, at most 2 epochs; 1 finished", "training A: 1 final trainings of baseline",
                 "14 shards; 4 finished", "at most 22 epochs; 11 finished", "tests: 12; 12 finished"):
        assert said in text, text


def test_the_maps_of_every_kind_can_be_judged_but_waes(first, shared):
    rows, job, _ = first
    again, executor = experiment(Path(job.place.output), shared, "evaluation.map_images=10", "evaluation.orders=[own]",
                                 "evaluation.approaches=[abn,ensemble,wae,single_stage]")
    judged = {r.approach: r.map_quality for r in again.run()}
    assert executor.done == [f"map quality of {n} repeat 0" for n in (
        "ensemble", "abn" if rows["abn"].learning_rate == 0.004 else "abn rate x0.5", "single_stage lambda=0.8")]
    found = {n: json.loads(Path(job.place.output, judged[n], "result.json").read_text())["quality"]["results"]["morf"][
        "values"] for n in judged
             if judged[n]}
    assert set(found["abn"]) >= {"attention", "random"} and set(found["single_stage"]) >= {"decoder", "random"}
    assert set(found) == {"abn", "ensemble", "single_stage"}


@pytest.mark.parametrize("name", ["abn", "wae", "ensemble", "single_stage"])
def test_an_interrupted_training_goes_on_to_the_same_row(first, shared, tmp_path, name):
    rows, job, done = first
    training = next(n for n in done if n.startswith(name) and "repeat" in n)
    overrides = (f"approach=[{name}]", *(o for o in TINY[1:] if not o.startswith("approaches.")))
    if name == "abn":
        overrides += ("approaches.abn.learning_rate_factors=[0.5,1.0]",)

    def run(stop_at=""):
        settings = load_settings("demo", [*overrides, f"output={tmp_path}", f"cache={shared}", f"data_root={shared}"],
                                 CONFIGS)
        prepared = prepare(settings)
        executor = Recorder(prepared.place, NoTracker())
        executor.done, executor.stop_at = [], stop_at
        return Job(settings, prepared.cells, prepared.place, executor, NoTracker()).run()

    with pytest.raises(KeyboardInterrupt):
        run(training)
    left = sorted(p.name for p in tmp_path.glob("models/*/running*"))
    assert left == (["running-maps-00001.npz"] if name == "single_stage" else []) + ["running.pt"]
    found = {r.approach: r for r in run()}
    assert same(found)[name] == same(rows)[name] and not list(tmp_path.glob("models/*/running*"))


def test_a_wae_cannot_be_explained_and_an_abn_can(first):
    rows, job, _ = first

    def source(name):
        return CheckpointSource(path=str(Path(rows[name].checkpoint, "checkpoint.pt")))

    with pytest.raises(StepError, match="needs a map for every image"):
        open_source(source("wae"), job.place)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("abn", "ensemble", "single_stage", "impactx"):
        model = open_source(source(name), job.place).module
        assert torch.equal(model(images), loaded(rows[name]).model.classify(images))


@pytest.mark.parametrize("overrides, said", [
    (("approach=[abn]", "models.lenet5.input_size=16"),
     "approaches.abn, for digits x lenet5: an attention branch needs features of at least 8x8 places"),
    (("approach=[integrated_gradients]", "approaches.integrated_gradients.attribution={method: occlusion, window: 40}"),
     "approaches.integrated_gradients.attribution: window = 40 is larger than the images"),
    (("approach=[wae]", "approaches.wae.attribution={method: occlusion, masker: blurr(3)}"),
     "approaches.wae.attribution.masker"),
    (("approach=[abn]", "approaches.abn.lambdas=[1]"),
     r"approaches.abn.lambdas = \[1\]: no such setting with kind abn"),
    (("approaches.mine={kind: nothing}",), "approaches.mine.kind = 'nothing': no such approach; there are abn, baseline"),
    (("approach=[wae]", "approaches.wae.attribution={method: shapp}"), "approaches.wae.attribution.method = 'shapp'"),
])
def test_what_cannot_be_is_said_before_anything_is_computed(shared, tmp_path, overrides, said):
    with pytest.raises(ConfigurationError, match=said):
        prepare(load_settings("demo", [*overrides, f"output={tmp_path}", f"cache={shared}", f"data_root={shared}"],
                              CONFIGS))
    assert not any((tmp_path / role).exists() for role in ("trials", "models", "maps"))


def test_table_2_of_the_paper():
    """From the text of arXiv 2502.12222v2: baseline, IMPACTX, ABN, WAE."""
    rows = {("cifar10", "lenet5"): "67.96 70.65 68.49 68.10", ("cifar10", "mobilenet"): "94.63 96.27 95.41 94.75",
            ("cifar10", "efficientnet_b2"): "98.06 98.38 98.19 98.08",
            ("cifar100", "lenet5"): "36.23 39.49 37.62 36.20", ("cifar100", "mobilenet"): "76.72 79.37 78.24 76.98",
            ("cifar100", "efficientnet_b2"): "87.88 89.06 88.89 88.27",
            ("stl10", "lenet5"): "52.59 55.86 53.36 52.99", ("stl10", "mobilenet"): "91.07 95.79 92.71 91.42",
            ("stl10", "efficientnet_b2"): "98.76 99.00 98.59 98.65"}
    for (dataset, model), text in rows.items():
        found = [paper_accuracy(dataset, model, name) for name in ("baseline", "impactx", "abn", "wae")]
        assert found == [pytest.approx(float(v) / 100) for v in text.split()]
    assert paper_accuracy("cifar10", "lenet5", "shuffled") is None
