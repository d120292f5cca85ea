"""The prices of a plan, from rates that are given; that measured rates are true is tested in tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from impactx.configuration import load_settings
from impactx.experiment.plan import Cell, Configuration, DataFacts
from impactx.experiment.price_list import price_list
from impactx.experiment.pricing import MAPS, Measured, Range, Slots, price_cell, probes_of
from impactx.experiment.rates import STAGE1, TrainingRate
from impactx.experiment.units import Artifacts
from impactx.storage import Storage

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GRID = ("dataset=digits", "model=lenet5", "repeats=2", "grid.learning_rate=[0.001,0.002]", "grid.batch_size=[10,20]",
        "grid.validation_fraction=[0.2]", "training.epochs=30", "training.patience=5", "approach=[impactx]",
        "approaches.impactx.lambdas=[0.4,0.8]", "attribution.max_evals=100")
FACTS = DataFacts("d" * 64, 1000, 10, (32, 32), tuple("0123456789"))


def cells(*overrides: str, names=("digits",)) -> list[Cell]:
    settings = load_settings("full_grid", [*GRID, *overrides], CONFIGS)
    return [Cell(settings, settings.datasets["digits"].model_copy(update={"name": name}), settings.models["lenet5"],
                 FACTS) for name in names]


def measured(of: list[Cell], gpus: float = 0.0) -> Measured:
    """One second a step whatever the batch, a millisecond a validation image; two nodes, one of them twice as fast."""
    rates = Measured({"trial": Slots(4, 1, gpus), "model": Slots(4, 1, 0), "maps on CPUs": Slots(4, 1, 0)}, 4, gpus * 4)
    for probe in probes_of(of):
        for slot in ["maps on CPUs"] if probe.what == MAPS else ["trial", "model"]:
            for speed in (1, 2):
                rate = 5.0 * speed if probe.what == MAPS else TrainingRate(1 / speed, 0.001 / speed, 0)
                rates.add(slot, probe, 2, [rate, rate])
    return rates


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(Storage(tmp_path))


def test_an_epoch_takes_what_its_steps_and_images_take():
    rate = TrainingRate(step=0.5, image=0.01, epoch=2)
    assert rate.seconds(95, 30, 10) == pytest.approx(10 * 0.5 + 0.3 + 2)
    (cell,) = cells()
    # Two nodes of two slots each, one twice as fast: three quarters of the slower one's seconds... 4 / (2/t + 2/(t/2)).
    t = 40 + 0.2
    assert measured([cell]).epoch("trial", cell, STAGE1, 20, 800, 200) == pytest.approx(4 / (2 / t + 4 / t))


def test_cells_that_are_alike_are_measured_once():
    two = cells(names=("one", "two"))
    assert [(p.what, p.batch_size) for p in probes_of(two)] == [
        (STAGE1, 10), (STAGE1, 20), ("impactx", 10), ("impactx", 20), (MAPS, 0)]
    own = cells("approaches.impactx.batch_size=32")
    assert ("impactx", 32) in [(p.what, p.batch_size) for p in probes_of(own)]


def test_what_is_left_is_counted_and_priced(artifacts):
    (cell,) = cells()
    price = price_cell(cell, measured([cell]), artifacts)
    assert price.trials == 4 + 2 and price.evaluations == 2 * 1000 * 100
    assert price.map_bytes == 2 * 1000 * 3 * 32 * 32 * 4
    # Six epochs at least, thirty at most: 4 + 2 trials and 2 x 2 trainings.
    assert price.epochs == Range(6 * 10, 30 * 10)
    small, large = (2 / 3 * (steps + 0.2) for steps in (80, 40))
    found = {item.name: item for item in price.items}
    assert found["stage 1"].seconds.low == pytest.approx(6 * 2 * (small + large))
    assert found["stage 1"].seconds.high == pytest.approx(30 * 2 * (small + large))
    assert found["stage 1"].alone().low == pytest.approx(found["stage 1"].seconds.low / 4)
    assert found["final models"].seconds.low == pytest.approx(6 * 4 * min(small, large))
    assert found["final models"].seconds.high == pytest.approx(30 * 4 * max(small, large))
    assert found["impactx's search"].slots == 2, "two trials cannot use four slots"
    assert found["maps on CPUs"].alone().low == pytest.approx(2000 / 30)
    text = price_list([price], measured([cell]))
    assert "4 of 4 trials left" in text and "60 to 300 epochs" in text and "200,000 evaluations" in text
    assert "24.6 MB" in text


def test_what_exists_costs_nothing(artifacts):
    (cell,) = cells()
    units = cell.stage1_trials()
    for k, unit in enumerate(units):
        best = {"common_accuracy": 0.5 + k / 10, "val_loss": 1.0, "val_accuracy": 0.5}
        artifacts.finish(unit, {"best": best, "weights": None})
    a = cell.stage1_model(Configuration(0.002, 20, 0.2), 0)
    artifacts.finish(a, {"weights": "w" * 64})
    artifacts.finish(cell.maps(a, {"weights": "w" * 64}, 0), {})
    price = price_cell(cell, measured([cell]), artifacts)
    assert price.exists == "4 trials, A repeat 0, maps repeat 0" and price.trials == 2 and price.evaluations == 100_000
    found = {item.name: item for item in price.items}
    large = 2 / 3 * 40.2
    assert found["stage 1"].seconds == Range(0, 0)
    assert found["final models"].seconds.low == pytest.approx(6 * 3 * large), "the selected point is known now"
    assert found["final models"].seconds.high == pytest.approx(30 * 3 * large)


def test_strategies_cost_less(artifacts):
    (cell,) = cells("grid.strategy=random", "grid.max_trials=3")
    assert price_cell(cell, measured([cell]), artifacts).trials == 3 + 2
    (cell,) = cells("grid.strategy=asha", "grid.grace_epochs=2")
    assert price_cell(cell, measured([cell]), artifacts).epochs == Range(2 * 4 + 6 * 6, 30 * 10)
    (cell,) = cells("grid.max_hours=0.01")
    assert price_cell(cell, measured([cell]), artifacts).items[0].seconds.high == pytest.approx(36)


def test_gpus_are_priced_by_the_part_that_is_held(artifacts):
    (cell,) = cells()
    rates = measured([cell], gpus=0.25)
    item = price_cell(cell, rates, artifacts).items[0]
    assert item.gpu_hours(rates).low == pytest.approx(item.cpu_hours(rates).low / 4)
    assert "GPU-hours" in price_list([price_cell(cell, rates, artifacts)], rates)


def test_cells_that_share_a_cluster_take_no_longer_than_one_by_one(artifacts):
    two = cells(names=("one", "two"))
    rates = measured(two)
    one = price_list([price_cell(two[0], rates, artifacts)], rates)
    both = price_list([price_cell(cell, rates, artifacts) for cell in two], rates)
    assert one != both and both.count("alone on this cluster") == 2
