"""A cell's journal over several starts of one job."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from impactx.configuration import load_settings
from impactx.experiment.cell import Cell, DataFacts
from impactx.results.records import CellFacts
from impactx.run.journal import CellJournal
from impactx.storage import Storage

PATH = "jobs/job/cells/d.m.json"
FACTS = CellFacts(dataset="d", model="m", class_names=["a", "b"], image_size=(8, 8), train_images=9,
                  selection_metric="val_accuracy", fingerprint="f" * 32)
SETTINGS = load_settings("demo", ["grid.learning_rate=[0.001,0.002]", "grid.batch_size=[16]",
                                  "grid.validation_fraction=[0.2]"], Path(__file__).resolve().parents[2] / "configs")
CELL = Cell(SETTINGS, SETTINGS.datasets["digits"], SETTINGS.models["lenet5"], DataFacts(
    "d" * 64, 1437, 10, (32, 32), tuple("0123456789")))
TRIALS = [CELL.classifier_trial(point) for point in CELL.configurations()]
FINAL = CELL.classifier(CELL.configurations()[0], 0)


@pytest.fixture
def storage(tmp_path) -> Storage:
    """With the journal of a start that came to the cell's end, without wae."""
    storage = Storage(tmp_path)
    journal = begin(storage)
    journal.failed(TRIALS[1], "ValueError: broken")
    journal.selected("stage 1", TRIALS[0])
    journal.plan("training A", [FINAL])
    journal.left_out("wae", "StepError: no maps")
    journal.finished()
    return storage


def begin(storage: Storage, facts: CellFacts = FACTS) -> CellJournal:
    journal = CellJournal(storage, "job", facts)
    journal.plan("stage 1", TRIALS, search=True)
    return journal


def names(held: dict) -> list[str]:
    return [step["name"] for step in held["steps"]]


def test_what_is_written(storage):
    held = storage.read_json(PATH)
    assert names(held) == [*(trial.name for trial in TRIALS), "A repeat 0"]
    assert [(step["group"], step["search"]) for step in held["steps"]] == [("stage 1", True)] * 2 + [
        ("training A", False)]
    assert held["steps"][1]["folder"] == TRIALS[1].folder
    assert held["steps"][1]["parameters"]["learning_rate"] == 0.002
    assert held["failed"] == {TRIALS[1].folder: "ValueError: broken"}
    assert held["selected"] == {"stage 1": TRIALS[0].folder} and held["left_out"] == {"wae": "StepError: no maps"}


def test_a_start_that_is_interrupted_takes_nothing_away(storage):
    before = storage.read_json(PATH)
    for _ in range(2):
        begin(storage)
        # Why the earlier start went on without wae, or ended, is no longer so: this one is at it.
        assert storage.read_json(PATH) == before | {"left_out": {}}
    begin(storage).stopped("StorageError: full")
    assert storage.read_json(PATH)["error"] == "StorageError: full"
    begin(storage)
    assert storage.read_json(PATH) == before | {"left_out": {}}


def test_what_is_done_has_not_failed(storage):
    journal = begin(storage)
    journal.done(TRIALS[1])
    assert storage.read_json(PATH)["failed"] == {}
    journal.failed(TRIALS[1], "OSError: again")
    assert storage.read_json(PATH)["failed"] == {TRIALS[1].folder: "OSError: again"}
    journal.done(TRIALS[1])
    assert storage.read_json(PATH)["failed"] == {}


def test_at_the_cells_end_only_what_this_start_came_to_is_left(storage):
    journal = begin(storage)
    journal.selected("stage 1", TRIALS[0])
    assert len(names(storage.read_json(PATH))) == 3
    journal.finished()
    held = storage.read_json(PATH)
    assert names(held) == [trial.name for trial in TRIALS] and held["failed"] == {}


def test_another_choice_leaves_nothing_of_what_followed_from_the_earlier_one(storage):
    begin(storage).selected("stage 1", TRIALS[1])
    held = storage.read_json(PATH)
    assert held["selected"] == {"stage 1": TRIALS[1].folder} and names(held) == [trial.name for trial in TRIALS]


def test_of_other_data_under_the_same_settings_nothing_is_kept(storage):
    begin(storage, FACTS.model_copy(update={"fingerprint": "e" * 32}))
    held = storage.read_json(PATH)
    assert held["selected"] == held["failed"] == {} and len(held["steps"]) == 2
    assert held["facts"]["fingerprint"] == "e" * 32


@pytest.mark.parametrize("content", [b"", b'{"steps"', b"[]", b'{"facts": {"dataset": "d"}}',
                                     b'{"units": [], "rows": []}',
                                     json.dumps({"facts": FACTS.model_dump(mode="json"), "steps": [{}]}).encode()])
def test_a_damaged_journal_is_written_anew(storage, caplog, content):
    storage.write(PATH, content)
    with caplog.at_level(logging.WARNING, "impactx"):
        begin(storage)
    assert f"{storage.uri(PATH)} cannot be read and is written anew" in caplog.text
    assert len(storage.read_json(PATH)["steps"]) == 2
