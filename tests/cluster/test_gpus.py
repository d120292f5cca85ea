"""GPUs by themselves: on clusters whose GPUs only Ray's scheduler knows, so where work is put, not what a GPU does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch
from lab import ignore, task, until
from test_maps import in_background, of_node
from test_training import numbers, search, trials

from impactx.cluster.capacity import ClusterError
from impactx.cluster.devices import tracked_within
from impactx.cluster.reach import check_gpus
from impactx.experiment.artifacts import RUNNING
from impactx.experiment.steps.base import Context, StepError
from impactx.run.no_tracker import NoTracker
from impactx.settings import TrainingResources

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the clusters' GPUs are in name only, and must stay so")]
FOUR = {"grid": {"learning_rate": [0.001, 0.002, 0.003, 0.004], "batch_size": [32], "validation_fraction": [0.2]}}
QUARTER = {"trial": {"gpus": 0.25, "cpus": 0.5}}
ABSENT = "Ray gave this process GPU .*, where torch finds none"
ROOT = Path(__file__).resolve().parents[2]


def free_gpus() -> float:
    """The GPUs that nobody holds."""
    return ray.available_resources().get("GPU", 0.0)


@pytest.mark.timeout(300)
def test_without_a_setting_all_work_asks_for_gpus_and_says_where_torch_finds_none(lab):
    """A worker that Ray gave a GPU in name only does not compute on its CPU in silence."""
    two = lab(**FOUR)
    executor = two.ray(QUARTER, device="auto")
    found, _ = search(two, executor, trials(two))
    assert len(found) == 4
    assert all(result is None and "where torch finds none" in error and "cluster.device=cpu" in error
               for result, error in found.values())
    a = two.a()
    with pytest.raises(StepError, match=ABSENT):
        executor.train(task(a), ignore)
    two.local.train(task(a), ignore)
    maps = two.maps(a)
    with pytest.raises(StepError, match=ABSENT):
        executor.explain(task(maps), ignore)
    with pytest.raises(StepError, match=ABSENT):
        executor.process(task(two.cell.test(a, two.place.artifacts.result(a))))


def test_a_job_on_a_node_that_lacks_its_gpus_is_refused_before_it_begins(cluster, tmp_path):
    with pytest.raises(ClusterError, match="Ray counts 1 GPUs on node .*, where torch finds 0.*--num-gpus=0"):
        check_gpus(ray.nodes())
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "full_grid.py"), "--preset", "demo", f"output={tmp_path / 'out'}",
         f"cache={tmp_path / 'cache'}", "datasets.digits.subset=120", f"cluster.address={cluster.address}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")})
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "where torch finds 0" in done.stderr and "cluster.device=cpu" in done.stderr
    assert not list((tmp_path / "out").rglob("result.json"))


@pytest.mark.slow  # eight processes that start at once: a machine of two busy cores is too slow for it
@pytest.mark.timeout(300)
def test_trials_of_a_quarter_share_a_gpu_over_several_nodes_and_one_that_leaves_costs_nothing(cluster, lab):
    """Four quarters on each of two nodes; one is lost with its trials, which go on upon the other."""
    changes = {"training": {"epochs": 150, "patience": 150, "memory_mb": 64},
               "grid": {"learning_rate": [0.001, 0.002, 0.003, 0.004], "batch_size": [16, 32],
                        "validation_fraction": [0.2]}}
    two = lab("two", **changes)
    units, found = trials(two), {}
    second = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=128 * 2**20)
    cluster.wait_for_nodes()
    storage, lost = two.place.artifacts.storage, []

    def act():
        until(lambda: free_gpus() == 0, "eight trials at once on two GPUs")
        until(lambda: any(storage.exists(f"{unit.folder}/{RUNNING}") for unit in units), "an epoch")
        lost.extend(until(lambda: of_node(second, "TrialActor"), "a trial on the second node"))
        cluster.remove_node(second, allow_graceful=False)

    join = in_background(act)
    two.ray({"trial": {"gpus": 0.25, "cpus": 0.25}}, device="logical").search(
        [task(unit) for unit in units], lambda unit, result, error: found.setdefault(unit.name, (result, error)), ignore)
    join()
    assert lost and len(found) == 8
    assert all(result and not error for result, error in found.values())
    one = lab("one", **changes)
    here = one.local.train(task(units[0]), ignore)
    assert numbers(found[units[0].name][0]) == numbers(here)


@pytest.mark.timeout(300)
def test_a_training_over_gpus_of_two_nodes_equals_one_process(cluster, lab):
    precise = {"training": {"epochs": 3, "patience": 3, "memory_mb": 64, "precision": "float64"}}
    one, two = lab("one", **precise), lab("two", **precise)
    a = one.a()
    here = one.local.train(task(a), ignore)
    second = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=128 * 2**20)
    cluster.wait_for_nodes()
    try:
        there = two.ray({"training": {"workers": 2, "cpus": 0.5}}, device="logical").train(task(a), ignore)
    finally:
        cluster.remove_node(second)
    rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in result.history] for result in (here, there)]
    for row1, row2 in zip(*rows, strict=True):
        assert row1 == pytest.approx(row2, abs=1e-9, rel=0)


@pytest.mark.timeout(300)
def test_models_of_one_job_have_shares_of_their_own(lab):
    """LeNet-5 shares what a larger model has alone: the share is of the model whose step it is."""
    two = lab(**FOUR)
    executor = two.ray(QUARTER, device="logical")
    executor.resources["large"] = executor.resources["lenet5"].model_copy(update={"trial": TrainingResources()})
    small = trials(two)[0]
    large = small.model_copy(update={"model_name": "large"})
    assert executor.steps_at_once(small) == 4 and executor.steps_at_once(large) == 1
    assert executor.cells_at_once() == 4
    executor.resources["wide"] = executor.resources["lenet5"].model_copy(update={
        "trial": TrainingResources(cpus=0.25, gpus=0, workers=4), "training": TrainingResources(workers=1, gpus=0)})
    a = two.a().model_copy(update={"model_name": "wide"})
    test = two.cell.test(a, a.placeholder())
    assert [executor.steps_at_once(step) for step in (a, test)] == [2, 8], "a test is one worker of a trial's"
    held = []
    executor.search([task(large)], ignore, lambda unit, row: held.append(
        until(lambda: free_gpus() == 0, "a trial that holds the whole GPU")))
    assert held and two.place.artifacts.result(large) is not None


def test_what_does_not_fit_its_memory_names_batch_size_and_share(lab, monkeypatch):
    two = lab()
    a, trial, context = two.a(), trials(two)[0], Context(two.place)
    test = two.cell.test(a, two.local.train(task(a), ignore))

    def greedy(step, context):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand more")

    for step, share, said in (
            (a, TrainingResources(gpus=0.6, workers=2),
             r"out of memory with batch size 32 over 2 worker\(s\), each with a share of 0.6 GPU \(CUDA out of memory. "
             r"Tried to allocate 80 GiB\): raise models.lenet5.resources.training.gpus .* out of grid.batch_size$"),
            (trial, TrainingResources(), "raise models.lenet5.resources.trial.gpus or .*trial.workers"),
            (test, TrainingResources(gpus=0.25), "a share of 0.25 GPU .*: raise models.lenet5.resources.trial.gpus$")):
        monkeypatch.setattr(type(step), "execute", greedy)
        with pytest.raises(StepError, match=said):
            tracked_within(share, task(step), context, NoTracker())
