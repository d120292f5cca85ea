"""Two processes at one training: the last to come goes on, and files of both are never mixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from impactx.approaches.base import Candidate
from impactx.approaches.checkpoint import load_checkpoint
from impactx.experiment.artifacts import CHECKPOINT, OWNER, RUNNING
from impactx.experiment.cell import Cell, Classifier, Configuration, DataFacts
from impactx.experiment.ownership import Ownership, TakenOver
from impactx.experiment.steps.base import Context
from impactx.experiment.workplace import Workplace
from impactx.models import weights_fingerprint
from impactx.settings import ExperimentSettings
from impactx.storage import Storage


def train(step, place, on_epoch=None):
    """Train a step in this process."""
    return step.execute(Context(place, on_epoch=on_epoch))


def test_the_last_to_come_has_it(tmp_path):
    storage = Storage(tmp_path)
    first = Ownership(storage, "x/owner.json", "A repeat 0")
    first.check()
    second = Ownership(storage, "x/owner.json", "A repeat 0")
    second.check()
    with pytest.raises(TakenOver, match="A repeat 0: process .* works on it since .*running twice"):
        first.check()
    first.release()
    second.check()
    second.release()
    assert not (tmp_path / "x" / "owner.json").exists()
    with pytest.raises(TakenOver, match="finished it meanwhile"):
        second.check()


@pytest.fixture
def cell(tmp_path):
    """A small cell, and where its work is done."""
    settings = ExperimentSettings.model_validate({
        "datasets": {"digits": {"name": "digits", "source": "digits", "subset": 60}},
        "models": {"lenet5": {"name": "lenet5", "architecture": "lenet5"}},
        "training": {"epochs": 3, "patience": 3, "memory_mb": 64},
        "approaches": {"single": {"kind": "single_stage", "lambdas": [0.0, 0.4], "latent": 16, "explain_every": 9}}})
    place = Workplace(str(tmp_path / "out"), str(tmp_path), str(tmp_path / "cache"))
    dataset = settings.datasets["digits"]
    data = place.dataset(dataset)
    return Cell(settings, dataset, settings.models["lenet5"], DataFacts(
        data.fingerprint, len(data.train.labels), data.num_classes, data.image_size, data.class_names)), place


@pytest.fixture
def work(cell):
    """A small final training, and where it is done."""
    return cell[0].classifier(Configuration(0.004, 16, 0.2), 0), cell[1]


def files(step, place):
    return {path.name: path.read_bytes() for path in Path(place.output, step.folder).iterdir()}


def files_belong_together(step, place):
    result = place.artifacts.result(step)
    checkpoint = load_checkpoint(place.artifacts.storage.read(f"{step.folder}/{CHECKPOINT}"))
    return weights_fingerprint(checkpoint.model) == result.weights


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_checkpoint_keeps_the_lambda_of_its_training(cell, weight):
    """The one that was trained, not those that were searched: of lambda = 0 the decoder learned nothing."""
    configuration, place = Configuration(0.004, 16, 0.2), cell[1]
    a = cell[0].classifier(configuration, 0)
    classifier = Classifier(a, a.ref(train(a, place)))
    step = cell[0].approach_model("single", Candidate(weight), classifier)
    train(step, place)
    assert load_checkpoint(place.artifacts.storage.read(f"{step.folder}/{CHECKPOINT}")).weight == weight
    assert load_checkpoint(place.artifacts.storage.read(f"{a.folder}/{CHECKPOINT}")).weight is None


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_orphan_writes_nothing_once_another_process_is_at_the_same_training(work, epoch):
    step, place = work
    found = {}

    def meanwhile(row):
        if row["epoch"] == epoch and not found:
            found["other"] = train(step, place)
            found["files"] = files(step, place)

    if epoch < 3:
        with pytest.raises(TakenOver, match="finished it meanwhile"):
            train(step, place, on_epoch=meanwhile)
    else:  # nothing was left to do: what the other one kept is the result
        assert train(step, place, on_epoch=meanwhile).weights == found["other"].weights
    assert files(step, place) == found["files"]
    assert set(found["files"]) == {"result.json", CHECKPOINT} and files_belong_together(step, place)


def test_an_orphan_stops_while_the_other_is_still_at_work(work):
    step, place = work

    def orphan(row):
        if row["epoch"] == 1:
            Ownership(place.artifacts.storage, f"{step.folder}/{OWNER}", step.name)  # the new process has begun

    with pytest.raises(TakenOver, match="works on it since"):
        train(step, place, on_epoch=orphan)
    assert place.artifacts.result(step) is None and place.artifacts.storage.exists(f"{step.folder}/{RUNNING}")
    result = train(step, place)
    alone = replace(place, output=place.output + "-alone")
    assert result.weights == train(step, alone).weights and files_belong_together(step, place)
