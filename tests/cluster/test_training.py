"""Ray Train's data-parallel workers do what one process does; Ray Tune finds what a plain loop finds."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from lab import Lab, ignore, kill, task, until

from impactx.approaches.checkpoint import load_checkpoint
from impactx.experiment.artifacts import CHECKPOINT, RUNNING
from impactx.experiment.cell import Configuration
from impactx.experiment.steps.base import StepError
from impactx.models import build_classifier

pytestmark = pytest.mark.usefixtures("cluster")
TIMES = ("seconds", "seconds_this_process")


def numbers(result):
    """A result without its times, the fingerprint of the weights, and by how many workers it was computed."""
    history = [{k: v for k, v in row.items() if k not in TIMES} for row in result.history]
    return history, result.model_dump(exclude={*TIMES, "history", "weights", "best", "environments"})


def weights(lab, unit):
    """The state dict of a finished model."""
    return load_checkpoint(lab.place.artifacts.storage.read(f"{unit.folder}/{CHECKPOINT}")).model.state_dict()


def same_model(one, two, unit, tolerance):
    """Weights and history of a unit agree in two labs; returns the weights."""
    a, b = weights(one, unit), weights(two, unit)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    (rows1, rest1), (rows2, rest2) = (numbers(lab.place.artifacts.result(unit)) for lab in (one, two))
    assert rest1 == rest2
    assert len(rows1) == len(rows2) > 0
    for row1, row2 in zip(rows1, rows2, strict=True):
        assert row1 == pytest.approx(row2, abs=tolerance, rel=0)
    return a


def moved(start, found):
    """Every parameter that is trained is elsewhere than it started."""
    names = [name for name, p in start.named_parameters() if p.requires_grad]
    assert names
    for name in names:
        change = (found[name].double() - start.state_dict()[name].double()).abs().max()
        assert change > 1e-4, f"{name} moved by {change}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """A lab in float64 with A trained and its maps made in this process."""
    lab = Lab(tmp_path_factory.mktemp("one") / "output", cache, training={
        "epochs": 3, "patience": 3, "memory_mb": 64, "precision": "float64"})
    a = lab.a()
    lab.local.train(task(a), ignore)
    maps = lab.maps(a)
    lab.local.explain(task(maps), ignore)
    lab.local.train(task(lab.stage2(a)), ignore)
    return lab


def test_two_workers_equal_one_in_float64(trained, lab):
    two = lab(training=trained.settings.training.model_dump())
    a = two.a()
    part = len(a.split_of(two.place.dataset(a.dataset)).train)
    assert part % 32 and part > 64, "no short last batch: the test would miss its weight"
    seen = []
    two.ray({"training": {"workers": 2, "cpus": 0.5}}).train(task(a), lambda unit, row: seen.append(row["epoch"]))
    assert seen == [1, 2, 3]
    found = same_model(trained, two, a, 1e-9)
    moved(build_classifier(two.settings.models["lenet5"], 10, (32, 32), seed=0), found)

    # Stage 2 stands on the very same A and maps.
    maps = trained.maps(a)
    for folder in (a.folder, maps.folder):
        for name in trained.place.artifacts.storage.names(folder):
            two.place.artifacts.storage.write(f"{folder}/{name}", trained.place.artifacts.storage.read(
                f"{folder}/{name}"))
    net = two.stage2(a)
    two.ray({"training": {"workers": 2, "cpus": 0.5}}).train(task(net), ignore)
    found = same_model(trained, two, net, 1e-9)
    classifier = load_checkpoint(trained.place.artifacts.storage.read(f"{a.folder}/{CHECKPOINT}")).model
    moved(two.settings.approaches["impactx"].build(two.settings.models["lenet5"], classifier, seed=0,
                        channels=3), found)
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(found[f"a.{name}"], value, rtol=0, atol=0)


def test_two_workers_equal_one_in_float32_over_ten_steps(lab):
    changes = {"training": {"epochs": 5, "patience": 5, "memory_mb": 64},
               "grid": {"learning_rate": [0.002], "batch_size": [41], "validation_fraction": [0.2]}}
    one, two = lab("one", **changes), lab("two", **changes)
    unit = one.cell.classifier(Configuration(0.002, 41, 0.2), 0)
    done = one.local.train(task(unit), ignore)
    assert -(-done.train_images // 41) * done.epochs == 10
    two.ray({"training": {"workers": 2, "cpus": 0.5}}).train(task(unit), ignore)
    same_model(one, two, unit, 1e-5)


def search(lab, executor, units):
    """What a search reports: unit's name -> (numbers, error), and the epochs seen."""
    found, epochs = {}, []
    executor.search([task(u) for u in units],
                    lambda unit, result, error: found.setdefault(unit.name, []).append(
                        (numbers(result) if result else None, error)),
                    lambda unit, row: epochs.append((unit.name, row["epoch"])))
    assert all(len(reports) == 1 for reports in found.values())
    return {name: reports[0] for name, reports in found.items()}, epochs


def broken(unit):
    """The same unit of another data set: it cannot be worked on."""
    return type(unit).model_validate(dict(unit) | {"name": "the broken one", "data": "f" * 32})


def trials(lab):
    """The trials of stage 1."""
    return [lab.cell.classifier_trial(point) for point in lab.cell.configurations()]


def test_search_equals_local_search_and_survives_a_trial_that_raises(lab):
    one, two = lab("one"), lab("two")
    units = [broken(trials(one)[0]), *trials(one)]
    here, _ = search(one, one.local, units)
    there, epochs = search(two, two.ray(), units)
    assert there == here
    assert here["the broken one"][0] is None and "f" * 32 in here["the broken one"][1]
    assert all(result and not error for name, (result, error) in here.items() if name != "the broken one")
    assert {(u.name, e) for u in units[1:] for e in (1, 2, 3)} >= set(epochs) >= {(u.name, 3) for u in units[1:]}


def test_a_killed_trial_is_tried_again_and_goes_on(lab):
    # Long enough to be met under way.
    changes = {"training": {"epochs": 60, "patience": 60, "memory_mb": 64}}
    one, two = lab("one", **changes), lab("two", **changes)
    units = trials(one)[:1]
    here, _ = search(one, one.local, units)
    killed = []

    def kill_it():
        until(lambda: two.place.artifacts.storage.exists(f"{units[0].folder}/{RUNNING}"), "the first epoch")
        killed.extend(kill("TrialActor"))

    thread = threading.Thread(target=kill_it)
    thread.start()
    there, epochs = search(two, two.ray(max_failures=1), units)
    thread.join()
    assert len(killed) == 1
    assert there == here
    assert [e for _, e in epochs].count(1) <= 1, "the second try began anew"


def test_trials_over_two_workers(lab):
    one = lab("one", training={"epochs": 2, "patience": 2, "memory_mb": 64, "precision": "float64"})
    two = lab("two", training=one.settings.training.model_dump())
    units = trials(one)[:1]
    here, _ = search(one, one.local, units)
    there, _ = search(two, two.ray({"trial": {"workers": 2, "cpus": 0.5}}), units)
    (rows1, rest1), (rows2, rest2) = here[units[0].name][0], there[units[0].name][0]
    assert rest1 == rest2 and not there[units[0].name][1]
    for row1, row2 in zip(rows1, rows2, strict=True):
        assert row1 == pytest.approx(row2, abs=1e-9, rel=0)


def test_an_error_of_a_training_arrives_as_itself_and_is_not_tried_again(lab):
    two = lab()
    with pytest.raises(StepError, match="f" * 32):
        two.ray().train(task(broken(two.a())), ignore)


@pytest.mark.slow
def test_a_killed_worker_of_a_training_is_replaced(lab):
    changes = {"training": {"epochs": 60, "patience": 60, "memory_mb": 64}}
    one, two = lab("one", **changes), lab("two", **changes)
    unit, killed = one.a(), []
    here = one.local.train(task(unit), ignore)

    def kill_it(unit, row):
        if not killed:
            killed.extend(kill("RayTrainWorker"))

    there = two.ray(max_failures=1).train(task(unit), kill_it)
    assert killed
    assert numbers(there) == numbers(here)
    assert np.isfinite(here.best["val_loss"]) and there.weights == here.weights
