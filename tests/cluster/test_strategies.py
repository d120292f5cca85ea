"""ASHA by Ray Tune: who falls behind is stopped, is not taken for finished, and can go on."""

from __future__ import annotations

import logging

import pytest
from test_cells import DIGITS, job, numbers, ray

from impactx.experiment.artifacts import RUNNING, STOPPED
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]
RATES = [0.004, 0.003, 1e-6, 2e-6, 3e-6, 4e-6]  # two that learn, four that do not
ONE_CELL = {"datasets": {"few": DIGITS | {"name": "few", "subset": 100}}, "approaches": {},
            "training": {"epochs": 9, "patience": 9, "memory_mb": 64}}


def grid(**strategy):
    return {"grid": {"learning_rate": RATES, "batch_size": [16], "validation_fraction": [0.2]} | strategy}


def trials(one):
    """The trials of stage 1."""
    cell = one.cells[0]
    return [cell.classifier_trial(point) for point in cell.configurations()]


def left(one):
    """The trials of the only cell: (finished, stopped)."""
    units, artifacts = trials(one), one.place.artifacts
    return ({u.key for u in units if artifacts.result(u)}, {u.key for u in units if artifacts.stopped(u)})


def test_asha_stops_who_falls_behind_and_the_full_grid_goes_on_from_there(tmp_path, cache, caplog):
    asha = grid(strategy="asha", grace_epochs=2, reduction=2)
    first = job(tmp_path / "out", cache, ray, **ONE_CELL, **asha)
    with caplog.at_level(logging.INFO, "impactx"):
        rows = first.run()
    finished, stopped = left(first)
    assert finished and stopped and not finished & stopped and len(finished | stopped) == 6
    assert rows[0].learning_rate in RATES[:2]
    assert f"{len(stopped)} of 6 were stopped early" in caplog.text and "stopped at epoch" in caplog.text
    storage = first.place.artifacts.storage
    for unit in trials(first):
        record = first.place.artifacts.stopped(unit)
        if record is not None:
            assert 2 <= record.epochs == len(record.history) < 9 and unit.learning_rate < 1e-3
            assert storage.exists(f"{unit.folder}/{RUNNING}"), "nothing to go on from"

    before = {key: storage.read(f"trials/{key}/{STOPPED}") for key in stopped}
    caplog.clear()
    with caplog.at_level(logging.INFO, "impactx"):
        assert numbers(job(tmp_path / "out", cache, ray, **ONE_CELL, **asha).run()) == numbers(rows)
    assert f"{len(finished)} of 6 trials reused, finished earlier; {len(stopped)} were stopped early" in caplog.text
    assert {key: storage.read(f"trials/{key}/{STOPPED}") for key in stopped} == before

    here = job(tmp_path / "one", cache, lambda place: LocalExecutor(place, NoTracker()), **ONE_CELL, **grid())
    there = job(tmp_path / "out", cache, ray, **ONE_CELL, **grid())
    assert numbers(there.run()) == numbers(here.run())
    for unit in trials(here):
        one, two = (j.place.artifacts.result(unit).history for j in (here, there))
        assert [row | {"seconds": 0} for row in one] == [row | {"seconds": 0} for row in two]
    assert not list((tmp_path / "out").rglob(STOPPED)) and not list((tmp_path / "out").rglob(RUNNING))
