"""Two processes at one training: the last to come goes on, and files of both are never mixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from impactx.experiment.claims import Claim, TakenOver
from impactx.experiment.plan import Cell, Configuration, DataFacts
from impactx.experiment.stage2 import Basis, Entry
from impactx.experiment.units import CHECKPOINT, CLAIM, RUNNING
from impactx.experiment.work import train_unit

from impactx.approaches.base import Candidate
from impactx.approaches.checkpoint import load_checkpoint
from impactx.approaches.single_stage import SingleStage
from impactx.experiment.workplace import Workplace
from impactx.models import weights_fingerprint
from impactx.settings import ExperimentSettings
from impactx.storage import Storage


def test_the_last_to_come_has_it(tmp_path):
    storage = Storage(tmp_path)
    first = Claim(storage, "x/claim.json", "A repeat 0")
    first.check()
    second = Claim(storage, "x/claim.json", "A repeat 0")
    second.check()
    with pytest.raises(TakenOver, match="A repeat 0: process .* works on it since .*running twice"):
        first.check()
    first.release()
    second.check()
    second.release()
    assert not (tmp_path / "x" / "claim.json").exists()
    with pytest.raises(TakenOver, match="finished it meanwhile"):
        second.check()


@pytest.fixture
def cell(tmp_path):
    """A small cell, and where its work is done."""
    settings = ExperimentSettings.model_validate({
        "datasets": {"digits": {"name": "digits", "source": "digits", "subset": 60}},
        "models": {"lenet5": {"name": "lenet5", "architecture": "lenet5"}},
        "training": {"epochs": 3, "patience": 3, "memory_mb": 64}})
    place = Workplace(str(tmp_path / "out"), str(tmp_path), str(tmp_path / "cache"))
    dataset = settings.datasets["digits"]
    data = place.dataset(dataset.model_dump(mode="json"))
    return Cell(settings, dataset, settings.models["lenet5"], DataFacts(
        data.fingerprint, len(data.train.labels), data.num_classes, data.image_size, data.class_names)), place


@pytest.fixture
def work(cell):
    """A small final training, and where it is done."""
    return cell[0].stage1_model(Configuration(0.004, 16, 0.2), 0), cell[1]


def files(unit, place):
    return {path.name: path.read_bytes() for path in Path(place.output, unit.folder).iterdir()}


def files_belong_together(unit, place):
    result = place.artifacts.result(unit)
    checkpoint = load_checkpoint(place.artifacts.storage.read(f"{unit.folder}/{CHECKPOINT}"))
    return weights_fingerprint(checkpoint.model) == result["weights"]


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_checkpoint_keeps_the_lambda_of_its_training(cell, weight):
    """The one that was trained, not those that were searched: of lambda = 0 the decoder learned nothing."""
    configuration, place = Configuration(0.004, 16, 0.2), cell[1]
    a = cell[0].stage1_model(configuration, 0)
    approach = Entry("single", SingleStage(lambdas=[0.0, 0.4], latent=16, explain_every=9))
    unit = approach.model(Basis(cell[0], configuration, 0, a, {}), Candidate(weight))
    train_unit(unit, place)
    assert load_checkpoint(place.artifacts.storage.read(f"{unit.folder}/{CHECKPOINT}")).weight == weight
    train_unit(a, place)
    assert load_checkpoint(place.artifacts.storage.read(f"{a.folder}/{CHECKPOINT}")).weight is None


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_orphan_writes_nothing_once_another_process_is_at_the_same_training(work, epoch):
    unit, place = work
    found = {}

    def meanwhile(row):
        if row["epoch"] == epoch and not found:
            found["other"] = train_unit(unit, place)
            found["files"] = files(unit, place)

    if epoch < 3:
        with pytest.raises(TakenOver, match="finished it meanwhile"):
            train_unit(unit, place, on_epoch=meanwhile)
    else:  # nothing was left to do: what the other one kept is the result
        assert train_unit(unit, place, on_epoch=meanwhile)["weights"] == found["other"]["weights"]
    assert files(unit, place) == found["files"]
    assert set(found["files"]) == {"result.json", CHECKPOINT} and files_belong_together(unit, place)


def test_an_orphan_stops_while_the_other_is_still_at_work(work):
    unit, place = work

    def orphan(row):
        if row["epoch"] == 1:
            Claim(place.artifacts.storage, f"{unit.folder}/{CLAIM}", unit.name)  # the new process has begun

    with pytest.raises(TakenOver, match="works on it since"):
        train_unit(unit, place, on_epoch=orphan)
    assert place.artifacts.result(unit) is None and place.artifacts.storage.exists(f"{unit.folder}/{RUNNING}")
    result = train_unit(unit, place)
    alone = replace(place, output=place.output + "-alone")
    assert result["weights"] == train_unit(unit, alone)["weights"] and files_belong_together(unit, place)
