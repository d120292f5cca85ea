"""Several cells at once on one cluster: each goes on by itself, and all end with what they have one by one."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
from lab import experiment

from impactx.experiment.artifacts import RUNNING
from impactx.experiment.preparation import prepare
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.settings import ClusterSettings, ModelResources

pytestmark = pytest.mark.usefixtures("cluster")
DIGITS = {"source": "digits", "augmentation": {"flip": False, "shift": 2}}


def job(folder, cache, executor, **changes):
    """A job of two cells; the second has more images, so its first stage takes longer."""
    settings = experiment(**{"repeats": 1, "datasets": {
        "few": DIGITS | {"name": "few", "subset": 40}, "many": DIGITS | {"name": "many", "subset": 240}},
        "output": str(folder), "cache": str(cache), "data_root": str(folder / "no-data"),
        "training": {"epochs": 4, "patience": 4, "memory_mb": 64},
        "grid": {"learning_rate": [0.002, 0.004, 0.003, 0.001], "batch_size": [8], "validation_fraction": [0.25]},
        "maps": {"shard_size": 5}} | changes)
    prepared = prepare(settings)
    return Job(settings, prepared.cells, prepared.place, executor(prepared.place), NoTracker())


def ray(place, **settings):
    from impactx.cluster.executor import RayExecutor

    # The GPU of the tests' cluster is one that only its scheduler knows.
    return RayExecutor(ClusterSettings(device="cpu", **settings), place, NoTracker(), {"lenet5": ModelResources()})


def numbers(rows):
    return [replace(row, train_seconds=0, seconds_in_all=None, checkpoint="") for row in rows]


def test_cells_at_once_equal_cells_one_by_one_and_overlap(tmp_path, cache, caplog):
    here = job(tmp_path / "one", cache, lambda place: LocalExecutor(place, NoTracker())).run()
    with caplog.at_level(logging.INFO, "impactx"):
        there = job(tmp_path / "two", cache, lambda place: ray(place, cells_at_once=2)).run()
    assert numbers(there) == numbers(here) and len(here) == 4
    lines = caplog.messages

    def first_and_last(cell):
        found = [k for k, line in enumerate(lines) if line.startswith(f"{cell} x lenet5: ")]
        return found[0], found[-1]

    # Which step meets which depends on the machine; one after the other, they would not meet at all.
    (few, few_ends), (many, many_ends) = first_and_last("few"), first_and_last("many")
    assert few < many_ends and many < few_ends, "both at once"


@pytest.mark.parametrize("settings, cells", [
    ({}, 3), ({"resources": {"trial": {"cpus": 0.25}}}, 8),
    ({"resources": {"trial": {"cpus": 0.25, "workers": 2}}}, 4), ({"cells_at_once": 1}, 1), ({"grows_to_cpus": 40}, 40)])
def test_as_many_cells_at_once_as_trials_fit(lab, settings, cells):
    assert lab().ray(**settings).cells_at_once() == cells


@pytest.mark.slow
def test_one_trial_at_a_time_over_all_cells(tmp_path, cache):
    most, executor = [0], []

    two = job(tmp_path, cache, lambda place: executor.append(ray(place, cells_at_once=2, max_concurrent_trials=1))
              or executor[0], approaches={}, training={"epochs": 2, "patience": 2, "memory_mb": 64})
    storage = two.place.artifacts.storage
    keys = [cell.classifier_trial(point) for cell in two.cells for point in cell.configurations()]
    over = threading.Event()

    def under_way():
        return {u.key for u in keys if storage.exists(f"{u.folder}/{RUNNING}")}

    def watch():
        while not over.wait(0.02):
            # A look takes a while: one trial may end and the next begin in the middle of it. What two looks in a row
            # see was there between them.
            most[0] = max(most[0], len(under_way() & under_way()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert len(two.run()) == 2
    finally:
        over.set()
        thread.join()
    assert most == [1]
