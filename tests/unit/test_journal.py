"""A cell's journal over several starts of one job."""

from __future__ import annotations

import logging

import pytest
from impactx.experiment.journal import CellJournal
from impactx.experiment.results import Row
from impactx.experiment.units import Unit

from impactx.storage import Storage

PATH, FACTS = "jobs/job/cells/d.m.json", {"class_names": ["a", "b"], "common": "f" * 32}
TRIALS = [Unit("trial", f"A lr={rate}", {"rate": rate}) for rate in (1, 2)]
FINAL = Unit("model", "A repeat 0", {"rate": 1, "final": True})


def row(approach: str = "baseline", repeat: int = 0, accuracy: float = 0.7) -> Row:
    return Row("d", "m", approach, repeat, None, 0.001, 32, 0.1, 0.7, accuracy, 10, 1, 1.0, None, "checkpoint", "test")


@pytest.fixture
def storage(tmp_path) -> Storage:
    """With the journal of a start that came to the cell's end, without wae."""
    storage = Storage(tmp_path)
    journal = begin(storage)
    journal.failed(TRIALS[1], "ValueError: broken")
    journal.selected("stage 1", TRIALS[0])
    journal.plan([FINAL])
    journal.tested(row())
    journal.tested(row("impactx"))
    journal.lost("wae", "WorkError: no maps")
    journal.finished()
    return storage


def begin(storage: Storage, facts: dict | None = None) -> CellJournal:
    journal = CellJournal(storage, "job", "d", "m", facts or FACTS)
    journal.plan(TRIALS, "stage 1")
    return journal


def test_a_start_that_is_interrupted_takes_nothing_away(storage):
    before = storage.read_json(PATH)
    for _ in range(2):
        begin(storage)
        # Why the earlier start went on without wae, or ended, is no longer so: this one is at it.
        assert storage.read_json(PATH) == before | {"lost": {}}
    assert [u["name"] for u in before["units"]] == ["A lr=1", "A lr=2", "A repeat 0"] and len(before["rows"]) == 2
    begin(storage).stopped("StorageError: full")
    assert storage.read_json(PATH)["error"] == "StorageError: full"
    begin(storage)
    assert storage.read_json(PATH) == before | {"lost": {}}


def test_what_comes_anew_takes_the_place_of_what_was(storage):
    journal = begin(storage)
    journal.tested(row(accuracy=0.9))
    journal.done(TRIALS[1])
    held = storage.read_json(PATH)
    assert [(r["approach"], r["test_accuracy"]) for r in held["rows"]] == [("baseline", 0.9), ("impactx", 0.7)]
    assert held["failed"] == {}
    journal.failed(TRIALS[1], "OSError: again")
    assert storage.read_json(PATH)["failed"] == {TRIALS[1].folder: "OSError: again"}
    journal.done(TRIALS[1])
    assert storage.read_json(PATH)["failed"] == {}


def test_at_the_cells_end_only_what_this_start_came_to_is_left(storage):
    journal = begin(storage)
    journal.selected("stage 1", TRIALS[0])
    journal.tested(row(accuracy=0.9))
    journal.finished()
    held = storage.read_json(PATH)
    assert [r["approach"] for r in held["rows"]] == ["baseline"] and held["failed"] == {}
    assert [u["name"] for u in held["units"]] == ["A lr=1", "A lr=2"]


def test_another_choice_leaves_nothing_of_what_followed_from_the_earlier_one(storage):
    begin(storage).selected("stage 1", TRIALS[1])
    held = storage.read_json(PATH)
    assert held["rows"] == [] and held["selected"] == {"stage 1": TRIALS[1].folder} and len(held["units"]) == 2


def test_of_other_data_under_the_same_settings_nothing_is_kept(storage):
    begin(storage, FACTS | {"common": "e" * 32})
    held = storage.read_json(PATH)
    assert held["rows"] == [] and held["selected"] == held["failed"] == {} and held["common"] == "e" * 32


@pytest.mark.parametrize("content", [b"", b'{"units"', b"[]", b'{"dataset": "d", "model": "m", "class_names": ["a", "b"'
                                     b'], "common": "ffffffffffffffffffffffffffffffff", "units": [{}]}'])
def test_a_damaged_journal_is_written_anew(storage, caplog, content):
    storage.write(PATH, content)
    with caplog.at_level(logging.WARNING, "impactx"):
        begin(storage)
    assert f"{storage.uri(PATH)} cannot be read and is written anew" in caplog.text
    assert len(storage.read_json(PATH)["units"]) == 2
