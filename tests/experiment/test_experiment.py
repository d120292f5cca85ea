"""A whole experiment in this process: real digits, real trainings and maps, no Ray and no MLflow."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import impactx
from impactx.approaches.base import Bench, Candidate
from impactx.approaches.baseline import Baseline
from impactx.approaches.checkpoint import load_checkpoint
from impactx.approaches.impactx import Impactx
from impactx.cli.main import main
from impactx.configuration import ConfigurationError, load_settings
from impactx.costs.dry_run import dry_run
from impactx.datasets import DataError, make_split
from impactx.experiment.cell import Classifier
from impactx.experiment.groups import SelectionError
from impactx.experiment.ownership import TakenOver
from impactx.experiment.preparation import prepare
from impactx.experiment.steps.base import Context, StepError
from impactx.experiment.steps.maps import ShardWorker
from impactx.experiment.steps.training import Trial
from impactx.explain.attribution import Explanations
from impactx.explain.maps.store import HEAD, MapStore, StoreError
from impactx.models import build_classifier
from impactx.models.weights import WeightsError
from impactx.results.export import export_job
from impactx.results.rows import table
from impactx.run.cell import PartsFailed
from impactx.run.job import CellsFailed, Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoRun, NoTracker
from impactx.settings import EvaluationSettings, ModelSettings, TrainingSettings
from impactx.storage import Storage, StorageError

ROOT = Path(__file__).resolve().parents[2]
TINY = ("datasets.digits.subset=100", "grid.learning_rate=[0.002,0.004]", "grid.batch_size=[16]",
        "grid.validation_fraction=[0.2]", "training.epochs=2", "attribution.max_evals=50", "maps.shard_size=30",
        "approaches.impactx.lambdas=[0.4,0.8]", "approaches.lambda0.learning_rate_factors=[1.0]", "repeats=1",
        "evaluation.map_images=0")


class Recorder(LocalExecutor):
    """Does the work, and writes down which."""

    def __init__(self, *args, stop_at: str = "") -> None:
        super().__init__(*args)
        self.done: list[str] = []
        self.stop_at = stop_at

    def train(self, task, on_epoch):
        self.done.append(task.step.name)

        def watched(step, row):
            on_epoch(step, row)
            if step.name == self.stop_at and row["epoch"] == 1:
                raise KeyboardInterrupt

        return super().train(task, watched)

    def explain(self, task, on_shards):
        def watched(done, before, total):
            self.done.append(f"{task.step.name}: {before + done} of {total}")
            on_shards(done, before, total)
            if task.step.name == self.stop_at:
                raise KeyboardInterrupt

        return super().explain(task, watched)

    def process(self, task):
        self.done.append(task.step.name)
        return super().process(task)


class Done:
    """An experiment that ran."""

    def __init__(self, output: Path, shared: Path, *overrides: str, tracker=None, stop_at: str = "") -> None:
        places = [f"output={output}", f"cache={shared}", f"data_root={shared}"]
        chosen = next((o for o in overrides if o.startswith("approach=")), "approach=[impactx,lambda0]")
        tiny = [o for o in TINY if not o.startswith("approaches.") or o.split(".")[1] in chosen]
        settings = load_settings("demo", [*tiny, *places, *overrides], ROOT / "configs")
        self.prepared = prepare(settings)
        self.cell, self.place = self.prepared.cells[0], self.prepared.place
        tracker = tracker or NoTracker()
        self.executor = Recorder(self.place, tracker, stop_at=stop_at)
        self.job = Job(settings, self.prepared.cells, self.place, self.executor, tracker)

    def run(self) -> Done:
        self.rows = self.job.run()
        return self

    @property
    def work(self) -> list[str]:
        return self.executor.done

    def numbers(self):
        return [replace(r, train_seconds=0, seconds_in_all=None, checkpoint=Path(r.checkpoint).name) for r in self.rows]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Decoded images and unpacked maps."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def first(tmp_path_factory, shared) -> Done:
    """An undisturbed run, which other tests copy."""
    return Done(tmp_path_factory.mktemp("first"), shared).run()


@pytest.fixture
def output(first, tmp_path) -> Path:
    """A copy of its output, to be damaged."""
    shutil.copytree(first.place.output, tmp_path / "output")
    return tmp_path / "output"


def folder_of(output: Path, role: str, name: str) -> Path:
    found = [p.parent for p in (output / role).glob("*/result.json") if json.loads(p.read_text())["name"] == name]
    assert len(found) == 1, (role, name, found)
    return found[0]


def stage1_trials(done: Done) -> list[Trial]:
    return [done.cell.classifier_trial(point) for point in done.cell.configurations()]


def times(output: Path) -> dict[str, int]:
    return {str(p.relative_to(output)): p.stat().st_mtime_ns for p in output.rglob("*")
            if p.is_file() and not {"jobs", "recipes"} & set(p.parts)}


def chosen_lambda(done: Done) -> float:
    return next(r.weight for r in done.rows if r.approach == "impactx")


def test_the_whole_experiment_in_its_order(first):
    weight = chosen_lambda(first)
    assert first.work == [
        "A lr=0.002 bs=16 vf=0.2", "A lr=0.004 bs=16 vf=0.2", "A repeat 0",
        "maps repeat 0: 30 of 100", "maps repeat 0: 60 of 100", "maps repeat 0: 90 of 100", "maps repeat 0: 100 of 100",
        "impactx lambda=0.4", "impactx lambda=0.8", f"impactx lambda={weight:g} repeat 0", "lambda0 lambda=0 repeat 0",
        "test of A repeat 0", f"test of impactx lambda={weight:g} repeat 0", "test of lambda0 lambda=0 repeat 0"]
    assert [(r.approach, r.weight) for r in first.rows] == [("baseline", None), ("impactx", weight), ("lambda0", 0.0)]
    assert all(0 <= r.test_accuracy <= 1 and r.test_images == len(first.place.dataset(
        first.cell.dataset).load_test()) for r in first.rows)
    kept = json.loads(Path(first.place.output, "jobs", first.job.key, "results.json").read_text())
    assert kept == [r.as_dict() for r in first.rows] and "lambda0" in table(first.rows)


def test_the_selection_is_the_best_trial(first):
    output = Path(first.place.output)
    found = [json.loads(p.read_text()) for p in (output / "trials").glob("*/result.json")]
    stage1 = [r for r in found if r["recipe"]["approach"]["kind"] == "baseline"]
    best = max(r["best"]["common_accuracy"] for r in stage1)
    chosen = [r["recipe"]["learning_rate"] for r in stage1 if r["best"]["common_accuracy"] == best]
    assert len(found) == 4 and first.rows[0].learning_rate in chosen
    assert not list(output.glob("trials/*/checkpoint.pt")) and len(list(output.glob("models/*/checkpoint.pt"))) == 3
    assert not list(output.rglob("running.pt"))


def test_the_test_results_are_those_of_the_kept_weights(first):
    for row in first.rows:
        model = impactx.load_model(Path(row.checkpoint, "checkpoint.pt"))
        test = first.place.dataset(first.cell.dataset).load_test()
        assert (model.predict(test.images).labels == test.labels).mean() == row.test_accuracy


def test_a_second_run_computes_nothing(first, output, shared, caplog):
    before = times(output)
    with caplog.at_level(logging.INFO, "impactx"):
        again = Done(output, shared).run()
    assert again.work == [] and again.numbers() == first.numbers() and times(output) == before
    assert "stage 1: 2 of 2 trials reused" in caplog.text and "maps repeat 0: reused" in caplog.text
    assert "test of A repeat 0: reused" in caplog.text and "starts" not in caplog.text


def test_execution_settings_reuse_everything(output, shared):
    again = Done(output, shared, "training.eval_batch_size=3", "training.memory_mb=64", "name=renamed",
                 "cluster.explain_memory_mb=64", "tracking.enabled=false").run()
    assert again.work == []


def test_only_what_was_deleted_is_made_anew(first, output, shared):
    shutil.rmtree(folder_of(output, "models", "lambda0 lambda=0 repeat 0"))
    before = times(output)
    again = Done(output, shared).run()
    assert again.work == ["lambda0 lambda=0 repeat 0"] and again.numbers() == first.numbers()
    assert {k: v for k, v in times(output).items() if k in before} == before


def test_a_deleted_shard_is_made_anew_although_the_maps_were_finished(first, output, shared, tmp_path):
    store = folder_of(output, "maps", "maps repeat 0")
    shard = next(store.glob("shard-00001*"))
    content = shard.read_bytes()
    shard.unlink()
    again = Done(output, shared).run()
    assert again.work == ["maps repeat 0: 100 of 100"] and shard.read_bytes() == content
    assert again.numbers() == first.numbers()


def of_another_model(storage: Storage, folder: str) -> None:
    """Put a store that is whole and consistent in itself, of another fingerprint, into a folder."""
    store = MapStore.open(storage, folder)
    shards = [store.read_shard(k) for k in range(store.spec.shards)]
    other = MapStore(storage, folder, replace(store.spec, fingerprint="0" * 32))
    for k, rows in enumerate(shards):
        maps = np.stack(rows["map"].to_numpy()).reshape(-1, *store.spec.shape)
        other.write_shard(k, rows["label"].to_numpy(), Explanations(
            maps, rows["score"].to_numpy(), rows["base_value"].to_numpy()))
    storage.write_json(f"{folder}/{HEAD}", storage.read_json(f"{folder}/{HEAD}") | {"fingerprint": "0" * 32})


def test_a_store_of_another_model_is_refused_by_whoever_opens_it(shared, tmp_path):
    job = ("approach=[impactx,wae]", "approaches.impactx.lambdas=[0.8]", "approaches.wae.learning_rate_factors=[1]",
           "grid.learning_rate=[0.004]", "attribution.max_evals=12", "evaluation.map_images=4")
    done, steps = Done(tmp_path, shared, *job), {}

    def noting(how, task, *rest):
        steps[task.step.name] = task.step
        return how(task, *rest)

    for what in ("train", "explain", "process"):
        setattr(done.executor, what, partial(noting, getattr(done.executor, what)))
    done.run().job.check()
    storage = done.place.artifacts.storage
    train, test = steps["maps repeat 0"], steps["class-weighted maps of test images repeat 0"]
    for maps in (train, test):
        assert maps.complete(done.place)
        of_another_model(storage, maps.folder)
        assert not maps.complete(done.place)
    for maps, user in [(train, "map quality of impactx lambda=0.8 repeat 0"), (train, "impactx lambda=0.8 repeat 0"),
                       (test, "test of wae repeat 0")]:
        (tmp_path / steps[user].folder / "result.json").unlink()
        with pytest.raises(StoreError) as caught:
            steps[user].execute(Context(done.place))
        said = str(caught.value)
        assert f"{storage.uri(maps.folder)} holds maps under fingerprint {'0' * 32}, not {maps.key}" in said
        assert "delete the folder and compute the maps again" in said
    again = Done(tmp_path, shared, *job).run()
    assert [row.approach for row in again.rows] == ["baseline"]
    with pytest.raises(PartsFailed, match=f"maps repeat 0: StoreError: .*{'0' * 32}, not {train.key}"):
        again.job.check()


@pytest.mark.parametrize("override, work", [
    ("approaches.impactx.lambdas=[0.4,0.6]", ["impactx lambda=0.6"]),
    ("training.patience=3", None),
    ("attribution.max_evals=60", ["maps repeat 0: 30 of 100"])])
def test_a_changed_setting_recomputes_what_depends_on_it(first, output, shared, override, work):
    again = Done(output, shared, override).run()
    if work is None:  # everything is trained again, to the very same weights: maps and tests are known for those
        assert again.work == [name for name in first.work if not name.startswith(("maps", "test"))]
        assert again.job.key != first.job.key and again.numbers() != first.numbers() == [
            replace(r, checkpoint=o.checkpoint, model_folder=o.model_folder) for r, o in zip(again.numbers(), first.numbers(), strict=True)]
    elif "lambdas" in override:
        rest = set(again.work) - {"impactx lambda=0.6", "impactx lambda=0.6 repeat 0",
                                  "test of impactx lambda=0.6 repeat 0", "impactx lambda=0.4 repeat 0",
                                  "test of impactx lambda=0.4 repeat 0"}
        assert work[0] in again.work and not rest
    else:
        assert again.work[0] == work[0] and "A repeat 0" not in again.work
        assert not any(name.startswith("test of A") for name in again.work)


@pytest.mark.parametrize("stop_at", ["A lr=0.004 bs=16 vf=0.2", "maps repeat 0", "lambda0 lambda=0 repeat 0"])
def test_an_interrupted_job_goes_on_and_ends_with_the_same_numbers(first, shared, tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        Done(tmp_path, shared, stop_at=stop_at).run()
    left = times(tmp_path)
    for file in [p for kind in ("result.json", "cells", "job.json") for p in tmp_path.rglob(kind)]:
        (file.parent / ".partial-of-a-killed-process").write_bytes(b"half")
    again = Done(tmp_path, shared).run()
    assert again.numbers() == first.numbers() and not list(tmp_path.rglob(".partial-*"))
    assert {k: v for k, v in times(tmp_path).items() if k in left and not k.endswith(("running.pt", "owner.json"))} == {
        k: v for k, v in left.items() if not k.endswith(("running.pt", "owner.json"))}
    if stop_at.startswith("maps"):
        assert again.work[0] == "maps repeat 0: 60 of 100"  # 30 lay there
    else:
        assert again.work[0] == stop_at
        results = [json.loads(p.read_text()) for p in tmp_path.rglob("result.json")]
        resumed = [r for r in results if r["name"] == stop_at]
        assert [len(r["history"]) for r in resumed] == [2]


DIVERGING = ("training.optimizer=sgd", "training.weight_decay=1e4")  # with a rate of 10, weights grow 1e5-fold a step


def test_a_diverging_trial_does_not_stop_the_grid(shared, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "impactx"):
        done = Done(tmp_path, shared, "approach=[]", *DIVERGING, "grid.learning_rate=[10,1e-5]").run()
    assert "A lr=10 bs=16 vf=0.2 diverged" in caplog.text and [r.learning_rate for r in done.rows] == [1e-5]


def test_a_trial_that_raises_does_not_stop_the_grid(shared, tmp_path, caplog):
    done = Done(tmp_path, shared, "approach=[]")
    bad = stage1_trials(done)[0]
    (tmp_path / bad.folder / "running.pt").mkdir(parents=True)  # a folder where a file must be
    with caplog.at_level(logging.INFO, "impactx"):
        done.run()
    assert f"{bad.name} failed: StorageError: could not read" in caplog.text and "1 of 2 trials failed" in caplog.text
    assert [r.learning_rate for r in done.rows] == [0.004]


def test_a_torn_state_of_a_trial_is_named(shared, tmp_path, caplog):
    done = Done(tmp_path, shared, "approach=[]")
    bad = stage1_trials(done)[0]
    done.place.artifacts.storage.write(f"{bad.folder}/running.pt", b"torn")
    with caplog.at_level(logging.INFO, "impactx"):
        done.run()
    assert f"{tmp_path}/{bad.folder}/running.pt: the state of the interrupted training is damaged" in caplog.text


def test_when_all_trials_fail_the_reasons_are_told(shared, tmp_path):
    done = Done(tmp_path, shared, "approach=[]", *DIVERGING, "grid.learning_rate=[10,0.004]")
    bad = stage1_trials(done)[1]
    (tmp_path / bad.folder / "running.pt").mkdir(parents=True)
    with pytest.raises(SelectionError) as caught:
        done.run()
    assert "none of 2 trials" in str(caught.value) and "A lr=10 bs=16 vf=0.2: diverged" in str(caught.value)
    assert f"{bad.name}: StorageError: could not" in str(caught.value) and bad.folder in str(caught.value)


@pytest.mark.parametrize("damage, said, work", [
    ("another", "is of another model: its weights are", "stage 2"),
    ("another", "is of another model: its weights are", "maps"),
    ("another", "is of another model: its weights are", "test"),
    ("missing", "is missing", "test"), ("torn", "cannot be used", "stage 2")])
def test_a_wrong_checkpoint_is_refused_by_name(output, shared, damage, said, work):
    file = folder_of(output, "models", "A repeat 0") / "checkpoint.pt"
    if damage == "another":
        shutil.copy(folder_of(output, "models", "lambda0 lambda=0 repeat 0") / "checkpoint.pt", file)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    role, name = {"stage 2": ("models", "lambda0 lambda=0 repeat 0"), "maps": ("maps", "maps repeat 0"),
                  "test": ("tests", "test of A repeat 0")}[work]
    shutil.rmtree(folder_of(output, role, name))
    with pytest.raises(StepError) as caught:
        Done(output, shared).run().job.check()
    assert str(file) in str(caught.value) and said in str(caught.value) and "delete the folder" in str(caught.value)


def test_other_data_on_a_node_are_refused(first, tmp_path):
    """A plan for one data set, worked on where another lies."""
    cell = copy(first.cell)
    cell.facts = replace(cell.facts, fingerprint="0" * 64)
    other = cell.classifier_trial(cell.configurations()[0])
    with pytest.raises(StepError, match="give every node the same files"):
        other.execute(Context(replace(first.place, output=str(tmp_path))))


@pytest.mark.parametrize("part", ["fingerprint", "test_fingerprint"])
@pytest.mark.parametrize("kind", ["maps", "test", "map_quality"])
def test_every_step_refuses_other_data_than_its_plans(first, tmp_path, kind, part):
    """As above, for what comes after the trainings."""
    cell = copy(first.cell)
    cell.settings = cell.settings.model_copy(update={"evaluation": EvaluationSettings(map_images=12)})
    a = cell.classifier(next(p for p in cell.configurations() if p.learning_rate == first.rows[0].learning_rate), 0)
    result = first.place.artifacts.result(a)
    cell.facts = replace(cell.facts, **{part: "0" * 64})
    a = a.model_copy(update={"data": cell.facts.fingerprint})
    step = {"test": lambda: cell.test(a, result), "map_quality": lambda: cell.map_quality(a, result),
            "maps": lambda: cell.maps(Classifier(a, a.ref(result)), cell.settings.attribution, part="test")}[kind]()
    with pytest.raises(StepError, match="the (data set|test part of) 'digits' on this node has fingerprint"):
        step.execute(Context(replace(first.place, output=str(tmp_path))))


def test_a_weights_file_replaced_after_planning_is_refused_where_it_is_loaded(shared, tmp_path):
    def write(seed):
        net = build_classifier(ModelSettings(name="lenet5", architecture="lenet5"), 10, (32, 32), seed=seed)
        torch.save(net.trunk.state_dict(), tmp_path / "w.pth")

    write(1)
    done = Done(tmp_path / "out", shared, f"models.lenet5.weights={tmp_path / 'w.pth'}")
    planned, trial = (tmp_path / "w.pth").read_bytes(), stage1_trials(done)[0]
    write(2)
    with pytest.raises(WeightsError, match=r"w.pth is another file than the one that is meant.*put that file back"):
        trial.execute(Context(done.place))
    assert done.place.artifacts.result(trial) is None
    (tmp_path / "w.pth").write_bytes(planned)
    assert trial.execute(Context(done.place)).best_epoch
    with pytest.raises(ConfigurationError, match="models.lenet5.weights_sha256 = 0000.*the file .*w.pth has "):
        Done(tmp_path / "out", shared, f"models.lenet5.weights={tmp_path / 'w.pth'}",
             f"models.lenet5.weights_sha256='{'0' * 64}'")


def test_every_result_says_in_which_environment_it_was_computed(first):
    results = [json.loads(p.read_text()) for p in Path(first.place.output).glob("*/*/result.json")]
    assert {r["kind"] for r in results} == {"trial", "model", "maps", "test"}
    for result in results:
        (environment,) = result["environments"]
        assert environment | {"device": "", "versions": {}} == {
            "device": "", "precision": "float32", "compiled": False, "workers": 1, "threads": 1, "versions": {}}
        assert environment["device"] and environment["versions"]["torch"] == importlib.metadata.version("torch")
        assert {"impactx", "numpy", "shap", "timm", "torchvision"} <= set(environment["versions"])
    assert {(r.train_precision, r.test_precision) for r in first.rows} == {("float32", "float32")}
    assert {r.approach: r.maps_precision for r in first.rows} == {
        "baseline": "", "impactx": "float32", "lambda0": "float32"}


def test_maps_made_by_several_environments_say_so(first, tmp_path):
    """Shards that two processes made, each with its own number of threads."""
    cell, row = first.cell, first.rows[0]
    a = cell.classifier(next(p for p in cell.configurations() if p.learning_rate == row.learning_rate), 0)
    step = cell.maps(Classifier(a, a.ref(first.place.artifacts.result(a))), cell.settings.attribution)
    output = tmp_path / "out"
    shutil.copytree(first.place.output, output)
    shutil.rmtree(output / step.folder)
    place = replace(first.place, output=str(output))
    ShardWorker(step, replace(place, threads=2)).make(1)
    result = step.execute(Context(place))
    assert sorted(e.threads for e in result.environments) == [1, 2]


def test_incomplete_maps_are_not_finished(first, output):
    place = replace(first.place, output=str(output))
    c = first.cell.configurations()[0]
    c = replace(c, learning_rate=first.rows[0].learning_rate)
    a = first.cell.classifier(c, 0)
    maps = first.cell.maps(Classifier(a, a.ref(place.artifacts.result(a))), first.cell.settings.attribution)
    next((output / maps.folder).glob("shard-00002*")).unlink()
    with pytest.raises(StepError, match="1 of 4 shards are missing"):
        maps.finish(place, 1.0, 0, 0.0)


def test_an_output_that_cannot_be_written_is_told_before_anything_is_decoded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"could not write {tmp_path}/file/out"):
        Done(tmp_path / "file" / "out", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("override, said", [
    ("models.lenet5.architecture=resnet999", "resnet999"), ("attribution.masker=blurr(3)", "blurr"),
    ("models.lenet5.weights=/no/such/file.pth", "/no/such/file.pth"), ("models.lenet5.input_size=8", "input_size")])
def test_what_can_be_known_before_is_told_before(tmp_path, shared, override, said):
    with pytest.raises((ConfigurationError, DataError), match=said.replace("(", r"\(")):
        Done(tmp_path, shared, override)
    assert not any((tmp_path / role).exists() for role in ("trials", "models", "maps"))


def test_a_relative_weights_file_reaches_the_workers_as_an_absolute_one(tmp_path, shared, monkeypatch):
    net = build_classifier(ModelSettings(name="lenet5", architecture="lenet5"), 10, (32, 32), seed=1)
    torch.save(net.trunk.state_dict(), tmp_path / "w.pth")
    monkeypatch.chdir(tmp_path)
    near, far = (stage1_trials(Done(tmp_path / "out", shared, f"models.lenet5.weights={path}"))[0]
                 for path in ("w.pth", tmp_path / "w.pth"))
    assert near.model.weights == far.model.weights == str(tmp_path / "w.pth")
    assert near.key == far.key and "w.pth" not in json.dumps(near.recipe)


def test_a_dry_run_tells_what_is_wrong(tmp_path):
    lenet = ModelSettings(name="lenet5", architecture="lenet5", weights=str(tmp_path / "none.pth"))
    net = ModelSettings(name="net", architecture="resnet999")
    settings = load_settings("demo", [f"output={tmp_path}/out"], ROOT / "configs")
    with pytest.raises(ConfigurationError) as caught:
        dry_run(settings.model_copy(update={"models": {"lenet5": lenet, "net": net}}))
    assert "none.pth': no such file" in str(caught.value) and "resnet999" in str(caught.value)


def test_a_dry_run_lists_and_writes_nothing(first, output, shared, tmp_path):
    def text(*overrides):
        return dry_run(load_settings("demo", [*TINY, f"cache={shared}", f"data_root={shared}", *overrides],
                                     ROOT / "configs"))

    empty = tmp_path / "empty"
    fresh, finished = text(f"output={empty}"), text(f"output={output}")
    assert not empty.exists() and "4 trials and 3 final trainings of at most 2 epochs" in fresh
    assert "5,000 explainer evaluations in 4 shards" in fresh and "finished" not in fresh
    for line in ("stage 1: 2 trials, at most 4 epochs; 2 finished",
                 "training A: 1 final trainings of baseline, at most 2 epochs; 1 finished",
                 "maps: 1 stores of 100 maps, 5,000 evaluations, 4 shards; 1 finished",
                 "stage 2 of impactx: 2 trials, at most 4 epochs; 2 finished",
                 "final trainings: 2 final trainings of impactx, lambda0, at most 4 epochs; 2 finished",
                 "tests: 3; 3 finished"):
        assert f"    {line}\n" in f"{finished}\n" and f"    {line.partition(';')[0]}\n" in f"{fresh}\n", line
    assert "map quality" not in fresh and (
        "map quality: 3, maps of every model on 7 test images, at most 14,910 forward passes" in text(
            f"output={empty}", "evaluation.map_images=7"))
    with pytest.raises(ConfigurationError, match="evaluation.metrics: morf: region = 40"):
        text(f"output={empty}", "evaluation.map_images=7", "evaluation.metrics=[{metric: morf, region: 40}]")


def test_float64_works_from_end_to_end(shared, tmp_path):
    done = Done(tmp_path, shared, "training.precision=float64", "approach=[impactx]",
                "approaches.impactx.lambdas=[0.8]", "grid.learning_rate=[0.004]").run()
    assert [r.approach for r in done.rows] == ["baseline", "impactx"]
    net = load_checkpoint(Path(done.rows[1].checkpoint, "checkpoint.pt")).model
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def test_predicted_maps_come_back_in_the_attributions_units(first):
    row = next(r for r in first.rows if r.approach == "impactx")
    found = load_checkpoint(Path(row.checkpoint, "checkpoint.pt"))
    data = first.place.dataset(first.cell.dataset)
    store = MapStore.open(first.place.artifacts.storage, str(folder_of(
        Path(first.place.output), "maps", "maps repeat 0").relative_to(first.place.output)))
    split = make_split(data.train.labels, 0.2, common_fraction=0.2, seed=0)
    maps = first.place.map_array(store, data)
    assert found.map_scale == pytest.approx(float(np.asarray(maps[split.train], np.float64).std()), rel=1e-6)
    images = data.train.images[:5]
    with torch.no_grad():
        raw = found.model(torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 255)[1].numpy()
    np.testing.assert_allclose(impactx.load_model(Path(row.checkpoint, "checkpoint.pt")).predict(images).maps,
                               raw * found.map_scale, rtol=1e-4, atol=1e-7)


def test_a_data_set_above_the_memory_budget_trains_to_the_same_numbers(first):
    data = first.place.dataset(first.cell.dataset)
    split = make_split(data.train.labels, 0.2, common_fraction=0.2, seed=0)
    maps = np.random.default_rng(0).normal(size=(100, 3, 32, 32)).astype(np.float32)
    lenet = ModelSettings(name="lenet5", architecture="lenet5")
    histories = []
    for megabytes in (4096, 0):
        training = TrainingSettings(epochs=2).model_copy(update={"memory_mb": megabytes})
        bench = Bench(data=data, split=split, model=lenet, training=training, seed=0, learning_rate=0.002, batch_size=16,
                      augmentation=impactx.AugmentationSettings())
        one = Baseline().train(bench)
        two = Impactx().train(replace(bench, candidate=Candidate(0.8), classifier=lambda a=one.model: a,
                                      maps=lambda: (maps, 2.0)))
        histories.append([{k: v for k, v in row.items() if k != "seconds"}
                          for row in one.fit.history + two.fit.history])
    assert histories[0] == histories[1]


def test_a_finished_job_that_is_started_again_and_interrupted_keeps_its_report(first, output, shared):
    storage = Storage(output)

    def left():
        export = export_job(storage, first.job.key)
        return export.cells, export.evidence

    class Interrupting(NoTracker):
        def replay(self, *args, **kwargs):
            raise KeyboardInterrupt

    before = left()
    (cell,), _ = before
    assert len(cell.rows) == 3 and not cell.missing
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Done(output, shared, tracker=Interrupting()).run()
        assert left() == before
    Done(output, shared).run()
    assert left()[0][0].steps == cell.steps


# ---- what fails alone

class Faulty(Recorder):
    """Some steps raise, and the losses of some trainings are not finite: by the beginnings of their names."""

    raising: dict[str, Exception] = {}
    diverging: tuple[str, ...] = ()

    def _check(self, task):
        for name, error in self.raising.items():
            if task.step.name.startswith(name):
                self.done.append(task.step.name)
                raise error

    def train(self, task, on_epoch):
        self._check(task)
        result = super().train(task, on_epoch)
        if task.step.name.startswith(self.diverging):
            result = result.model_copy(update={"weights": None, "best": None, "diverged": True})
            self.place.artifacts.finish(task.step, result)
        return result

    def explain(self, task, on_shards):
        self._check(task)
        return super().explain(task, on_shards)

    def process(self, task):
        self._check(task)
        return super().process(task)


def faulty(output, shared, *overrides, raising=None, diverging=(), tracker=None) -> Done:
    done = Done(output, shared, *overrides, tracker=tracker)
    done.executor.__class__ = Faulty
    done.executor.raising, done.executor.diverging = raising or {}, tuple(diverging)
    return done


def left_out(done: Done) -> str:
    """What the report says of it."""
    cell, = export_job(done.place.artifacts.storage, done.job.key).cells
    assert cell.error is None
    return "\n".join(cell.missing)


def have_results(done: Done) -> set[tuple[str, int]]:
    return {(row.approach, row.repeat) for row in done.rows}


FOUR = ("approach=[abn,impactx,lambda0,wae]", "approaches.impactx.lambdas=[0.8]", "repeats=2",
        "approaches.abn.learning_rate_factors=[0.5,1]", "grid.learning_rate=[0.004]")


def test_approaches_that_fail_do_not_take_the_others_results(shared, tmp_path, caplog):
    """A search without a choice, one training, one store of maps and one test: each fails alone, and is named."""
    tracker = StatusTracker()
    done = faulty(tmp_path, shared, *FOUR, tracker=tracker, diverging=["abn"], raising={
        "lambda0 lambda=0 repeat 1": StepError("it failed 3 times"),
        "class-weighted maps of test images": StorageError("full"), "test of A repeat 1": StepError("not finite")})
    with caplog.at_level(logging.INFO, "impactx"):
        done.run()
    assert have_results(done) == {("baseline", 0), ("impactx", 0), ("impactx", 1), ("lambda0", 0)}
    said = [cell.sentence for cell in done.job.evidence.cells]
    assert said[0].startswith("One repeat cannot show whether the explanations help")
    kept = json.loads((tmp_path / "jobs" / done.job.key / "results.json").read_text())
    assert kept == [row.as_dict() for row in done.rows]
    with pytest.raises(PartsFailed) as caught:
        done.job.check()
    said = left_out(done)
    for what in ("abn failed: SelectionError: none of 2 trials",
                 "lambda0 lambda=0 repeat 1 failed: StepError: it failed 3 times",
                 "class-weighted maps of test images repeat 0 failed: StorageError: full",
                 "wae failed: it has no maps, their making failed: class-weighted maps of test images rep",
                 "test of A repeat 1 failed: StepError: not finite"):
        assert what in said and what.replace(" failed:", ":", 1) in str(caught.value), what
        assert what.replace(" failed:", " failed, the cell goes on without it:", 1) in caplog.text
    assert said.count("it failed 3 times") == 1 and "baseline: repeat 1 is not tested yet" in said
    assert tracker.ended["digits x lenet5"][0] == tracker.ended["demo"][0] == "FAILED"
    assert "none of 2 trials" in tracker.ended["digits x lenet5"][1]
    again = Done(tmp_path, shared, *FOUR, "approaches.abn.learning_rate_factors=[1]")
    assert again.job.key != done.job.key
    again.run().job.check()  # nothing that failed was left behind
    assert len(have_results(again)) == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TakenOver("another process works on it")])
@pytest.mark.parametrize("at", ["abn", "maps repeat 0", "lambda0 lambda=0 repeat 0", "test of A"])
def test_an_interrupt_and_another_process_end_everything_at_once(shared, tmp_path, error, at):
    done = faulty(tmp_path, shared, "approach=[impactx,abn,lambda0]", "approaches.impactx.lambdas=[0.8]",
                  "grid.learning_rate=[0.004]", raising={at: error})
    with pytest.raises(type(error)):
        done.run()
    # Trainings that were to be done beside the one that was taken over may still be done, as they may be under way.
    assert done.work[-1].startswith(at) or at == "abn" and isinstance(error, TakenOver)
    assert at == "test of A" or not any(name.startswith("test of") for name in done.work)
    assert not any((tmp_path / "jobs" / done.job.key).glob("results.*"))


def test_a_repeat_whose_a_diverged_is_left_out_for_every_approach(shared, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "impactx"):
        done = faulty(tmp_path, shared, *FOUR[1:], "approach=[impactx,abn]", diverging=["A repeat 0"]).run()
    assert have_results(done) == {(name, 1) for name in ("baseline", "impactx", "abn")}
    assert "A repeat 0: it diverged in its first epoch: the repeat is left out, for every approach" in caplog.text
    assert "A repeat 0: diverged" in left_out(done)
    done.job.check()


def test_without_a_repeat_of_a_nothing_can_go_on(shared, tmp_path):
    done = faulty(tmp_path, shared, *FOUR, diverging=["A repeat 0"], raising={"A repeat 1": ValueError("broken")})
    with pytest.raises(StepError) as caught:
        done.run()
    assert "no classifier A is left in 2 repeats" in str(caught.value)
    assert "A repeat 0: it diverged" in str(caught.value) and "A repeat 1: ValueError: broken" in str(caught.value)
    assert not any(name.startswith("maps") for name in done.work)


# ---- what is tracked

class FolderRun(NoRun):
    """Keeps texts and files in a folder; like MLflow's run it reads files only when it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.tags = folder, [], {}
        folder.mkdir(parents=True, exist_ok=True)

    def set_tags(self, tags):
        self.tags |= tags

    def log_text(self, text, path):
        (self.folder / path).write_text(text)

    def log_file(self, local_path, folder=""):
        self.files.append(Path(local_path))

    def finish(self, status="FINISHED", error=None):
        for file in self.files:
            shutil.copy(file, self.folder)


class FolderTracker(NoTracker):
    def __init__(self, folder: Path) -> None:
        self.folder, self.params = folder, {}

    def run(self, identity):
        self.params[identity.name] = identity.parameters
        return FolderRun(self.folder / identity.name.replace("/", "_"))


def test_runs_hold_the_resolved_step_the_split_and_the_checkpoint(shared, tmp_path):
    tracker = FolderTracker(tmp_path / "runs")
    done = Done(tmp_path / "out", shared, "approach=[impactx]", "approaches.impactx.lambdas=[0.8]",
                "tracking.uri=http://me:hidden-word@mlflow", tracker=tracker).run()
    assert tracker.params["demo"]["tracking"]["experiment"] == "impactx" and "hidden-word" not in str(tracker.params)
    assert not [p for p in (tmp_path / "runs").rglob("*.json") if "hidden-word" in p.read_text()]
    trial, model, two = (tmp_path / "runs" / name for name in (
        "A lr=0.002 bs=16 vf=0.2", "A repeat 0", "impactx lambda=0.8 repeat 0"))
    assert sorted(os.listdir(trial)) == ["step.json"]
    assert sorted(os.listdir(model)) == sorted(os.listdir(two)) == ["checkpoint.pt", "split.npz", "step.json"]
    a = done.cell.classifier(replace(done.cell.configurations()[0], learning_rate=done.rows[0].learning_rate), 0)
    assert json.loads((model / "step.json").read_text()) == json.loads(json.dumps(
        {"kind": "model", "recipe": a.recipe, "code": a.code, "inputs": a.inputs()}))
    data = done.place.dataset(done.cell.dataset)
    split, kept = make_split(data.train.labels, 0.2, common_fraction=0.2, seed=0), np.load(model / "split.npz")
    for part in ("train", "validation", "common"):
        np.testing.assert_array_equal(kept[part], getattr(split, part))
    for folder, row in zip((model, two), done.rows, strict=True):
        assert (folder / "checkpoint.pt").read_bytes() == Path(row.checkpoint, "checkpoint.pt").read_bytes()


# ---- a budget

HOURS = ("approach=[]", "grid.learning_rate=[0.002,0.003,0.004]")


def test_no_trial_is_begun_once_the_hours_are_spent(shared, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "impactx"):
        done = Done(tmp_path, shared, *HOURS, "grid.max_hours=1e-9").run()
    order = [trial.name for trial in stage1_trials(done)]
    assert done.work == [order[0], "A repeat 0", "test of A repeat 0"]
    assert "the budget of 1e-09 hours is spent, 2 of 3 trials were not begun" in caplog.text
    again = Done(tmp_path, shared, *HOURS, "grid.max_hours=1e-9").run()
    assert again.work == [] and again.numbers() == done.numbers()
    more = Done(tmp_path, shared, *HOURS, "grid.max_hours=1").run()
    assert more.work[:2] == order[1:]


def test_a_trial_that_was_begun_is_finished_although_the_hours_are_spent(shared, tmp_path):
    order = [trial.name for trial in stage1_trials(Done(tmp_path, shared, *HOURS, "grid.max_hours=1"))]
    with pytest.raises(KeyboardInterrupt):
        Done(tmp_path, shared, *HOURS, "grid.max_hours=1", stop_at=order[1]).run()
    again = Done(tmp_path, shared, *HOURS, "grid.max_hours=1e-9").run()
    assert again.work[0] == order[1] and order[2] not in again.work


def test_asha_needs_a_cluster(shared, tmp_path):
    with pytest.raises(StepError, match="'asha' needs a Ray cluster"):
        Done(tmp_path, shared, "approach=[]", "grid.strategy=asha").run()


# ---- several cells

class StatusTracker(NoTracker):
    """Remembers how each run ended: name -> (status, error)."""

    def __init__(self) -> None:
        self.ended = {}

    def run(self, identity):
        tracker, name = self, identity.name

        class Run(NoRun):
            def finish(self, status="FINISHED", error=None):
                tracker.ended.setdefault(name, (status, error))

        return Run()


TWO_CELLS = ("datasets.more.name=more", "datasets.more.source=digits", "datasets.more.subset=110", "approach=[]")


def test_a_cell_that_fails_does_not_end_the_others(shared, tmp_path, caplog):
    tracker = StatusTracker()
    done = Done(tmp_path, shared, *TWO_CELLS, tracker=tracker)
    for bad in stage1_trials(done):
        (tmp_path / bad.folder / "running.pt").mkdir(parents=True)  # a folder where a file must be
    with caplog.at_level(logging.INFO, "impactx"):
        done.run()
    assert [r.dataset for r in done.rows] == ["more"] and list(done.job.failed) == ["digits x lenet5"]
    with pytest.raises(CellsFailed, match=r"1 of 2 cells failed.*\n  - digits x lenet5: SelectionError: none of 2 tri"):
        done.job.check()
    assert tracker.ended["digits x lenet5"][0] == "FAILED" and "SelectionError" in tracker.ended["digits x lenet5"][1]
    assert tracker.ended["more x lenet5"][0] == "FINISHED" and tracker.ended["demo"][0] == "FAILED"
    lines = [r.getMessage() for r in caplog.records]
    assert all(line.startswith(("digits x lenet5: ", "more x lenet5: ", "after ")) for line in lines if "trial" in line)
    assert "digits x lenet5: failed: SelectionError: none of 2 trials" in caplog.text and "Traceback" not in caplog.text
    kept = json.loads((tmp_path / "jobs" / done.job.key / "results.json").read_text())
    assert [r["dataset"] for r in kept] == ["more"]


def test_a_job_without_a_cell_left_says_so_and_writes_no_table(shared, tmp_path):
    done = Done(tmp_path, shared, *TWO_CELLS, *DIVERGING, "grid.learning_rate=[10]")
    with pytest.raises(CellsFailed, match="2 of 2 cells failed"):
        done.run()
    assert not list(tmp_path.glob("jobs/*/results.*"))


def test_one_experiment_under_two_names_is_refused(shared, tmp_path):
    with pytest.raises(ConfigurationError, match="digits x lenet5 and digits x same are the same experiment"):
        Done(tmp_path, shared, "models.same.name=same", "models.same.architecture=lenet5", "models.same.input_size=32")


# ---- front doors

@pytest.mark.parametrize("error", [SelectionError("none"), StepError("of another model"), StorageError("full"),
                                   ConfigurationError("wrong")])
def test_a_users_error_is_one_message_and_status_2(error, capsys):
    log = logging.getLogger("impactx")
    handlers, propagate, level, on_term = log.handlers[:], log.propagate, log.level, signal.getsignal(signal.SIGTERM)

    def job():
        raise error

    try:
        with pytest.raises(SystemExit) as caught:
            main(job)
        with pytest.raises(ZeroDivisionError):
            main(lambda: 1 / 0)
    finally:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)
        signal.signal(signal.SIGTERM, on_term)
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"


def test_the_example_runs_as_it_stands(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "example.py")], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.split()[1])
    assert accuracy > 0.8 and "maps (359, 3, 32, 32)" in done.stdout and done.stderr == ""
    lines = [line for line in (ROOT / "docs" / "example.py").read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(lines) <= 15


def test_the_front_door_refuses_what_cannot_be(first):
    row = next(r for r in first.rows if r.approach == "impactx")
    net = impactx.load_model(Path(row.checkpoint, "checkpoint.pt"))
    data = first.place.dataset(first.cell.dataset)
    with pytest.raises(ValueError, match="starts from a classifier of stage 1"):
        impactx.train_impactx(net, data, np.zeros((100, 3, 32, 32), np.float32))
    with pytest.raises(ValueError, match="must be uint8"):
        net.predict(np.zeros((2, 32, 32, 3), np.float32))


def test_the_front_door_and_the_experiment_train_the_same_model(first):
    """One code for both: the same seed, split and settings give the very same accuracies."""
    row = first.rows[0]
    data = first.place.dataset(first.cell.dataset)
    schedule = impactx.Schedule(learning_rate=row.learning_rate, batch_size=16, validation_fraction=0.2,
                                augmentation=first.cell.dataset.augmentation)
    a = impactx.train_classifier(data, first.cell.model, first.cell.settings.training, schedule)
    kept = impactx.load_model(Path(row.checkpoint, "checkpoint.pt"))
    assert a.best["val_accuracy"] == row.val_accuracy and a.class_names == kept.class_names
    assert all(torch.equal(t, kept.model.state_dict()[n]) for n, t in a.model.state_dict().items())
