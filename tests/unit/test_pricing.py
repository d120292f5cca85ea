"""The prices of a plan, from rates that are given; that measured rates are true is tested in tests/cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from impactx.approaches.base import Candidate
from impactx.approaches.baseline import BASELINE
from impactx.approaches.ensemble import EnsembleNetwork
from impactx.configuration import load_settings
from impactx.costs.measured import JUDGING, MAPS, Measured, Probe, Slots
from impactx.costs.price_list import price_list
from impactx.costs.pricing import CellPrice, Item, Range, price_cell, probes_of
from impactx.costs.rates import TrainingRate
from impactx.evaluation.judgement import MapQuality as Judgement
from impactx.experiment.artifacts import RUNNING, Artifacts
from impactx.experiment.cell import Cell, Classifier, Configuration, DataFacts
from impactx.experiment.steps.maps import Maps, MapsResult
from impactx.experiment.steps.quality import QualityResult
from impactx.experiment.steps.training import TrainingResult
from impactx.explain.maps.store import MapStore, StoreError, StoreSpec
from impactx.models import build_classifier
from impactx.storage import Storage

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GRID = ("dataset=digits", "model=lenet5", "repeats=2", "grid.learning_rate=[0.001,0.002]", "grid.batch_size=[10,20]",
        "grid.validation_fraction=[0.2]", "training.epochs=30", "training.patience=5", "approach=[impactx]",
        "approaches.impactx.lambdas=[0.4,0.8]", "attribution.max_evals=100", "evaluation.map_images=0")
JUDGED = "evaluation.map_images=100"
FACTS = DataFacts("d" * 64, 1000, 10, (32, 32), tuple("0123456789"), test_images=300)


def cells(*overrides: str, names=("digits",)) -> list[Cell]:
    settings = load_settings("full_grid", [*GRID, *overrides], CONFIGS)
    return [Cell(settings, settings.datasets["digits"].model_copy(update={"name": name}), settings.models["lenet5"],
                 FACTS) for name in names]


def measured(of: list[Cell], gpus: float = 0.0, workers: int = 1) -> Measured:
    """One second a step whatever the batch, a millisecond a validation image; two nodes, one of them twice as fast.

    Maps that trainings make of themselves: five times as slowly as others in a trial, ten times in a final training.
    workers: of a trial and of a training; four of either are done at once.
    """
    training = Slots(4, workers, gpus, workers)
    rates = Measured({"lenet5": {"trial": training, "model": replace(training, gpus=0), "maps on CPUs": Slots(4, 1, 0),
                                 JUDGING: Slots(4, 1, 0)}}, 4, gpus * 4)
    for probe in probes_of(of):
        for slot in {MAPS: ["maps on CPUs"], JUDGING: [JUDGING]}.get(probe.subject, ["trial", "model"]):
            for speed in (1, 2):
                maps = 5.0 / {"trial": 5, "model": 10}.get(slot, 1)
                rate = maps * speed if probe.making else TrainingRate(1 / speed, 0.001 / speed, 0)
                add = rates.add_maps if probe.making else rates.add_training
                add(slot, probe, 2, [rate, rate])
    return rates


def training(accuracy: float = 0.5, weights: str | None = None, seconds: float = 0) -> TrainingResult:
    """A finished training."""
    best = {"common_accuracy": accuracy, "val_accuracy": accuracy, "val_loss": 1.0}
    return TrainingResult(seconds=seconds, best=best, best_epoch=1, epochs=1, history=[], diverged=False,
                          weights=weights, train_images=800, validation_images=200, seconds_this_process=seconds)


def made(maps: Maps) -> MapsResult:
    """A finished store."""
    return MapsResult(seconds=0, images=1000, shards=1, shape=(3, 32, 32), folder=maps.folder, maps_made=1000,
                      maps_per_second=None, process_seconds=None, map_std=1, map_abs_max=1)


JUDGEMENT = QualityResult(seconds=0, quality=Judgement(
    images=100, seconds=0, seconds_per_map={}, evaluations_per_map={}, results={}))


def finish_maps(cell: Cell, artifacts: Artifacts, repeats=(0, 1)) -> list[Classifier]:
    """Write down as finished all of stage 1 and, of these repeats, A and its maps; these A's."""
    for k, point in enumerate(cell.configurations()):
        artifacts.finish(cell.classifier_trial(point), training(0.5 + k / 10))
    point, trained = Configuration(0.002, 20, 0.2), []
    for repeat in repeats:
        step = cell.classifier(point, repeat)
        artifacts.finish(step, result := training(weights=f"w{repeat}" * 32))
        a = Classifier(step, step.ref(result))
        maps = cell.maps(a, cell.settings.attribution)
        spec = StoreSpec(maps.key, 1000, (3, 32, 32), cell.settings.maps.shard_size, {})
        store = MapStore.create(artifacts.storage, maps.folder, spec)
        for shard in store.missing():
            artifacts.storage.write(f"{maps.folder}/{store.shard_name(shard)}", b"")
        artifacts.finish(maps, made(maps))
        trained.append(a)
    return trained


def exactly(number: int) -> Range:
    """No range."""
    return Range(number, number)


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(Storage(tmp_path))


def test_an_epoch_takes_what_its_steps_and_images_take():
    rate = TrainingRate(step=0.5, image=0.01, epoch=2)
    assert rate.seconds(95, 30, 10) == pytest.approx(10 * 0.5 + 0.3 + 2)
    (cell,) = cells()
    # Two nodes of two slots each, one twice as fast: three quarters of the slower one's seconds... 4 / (2/t + 2/(t/2)).
    t = 40 + 0.2
    assert measured([cell]).epoch("trial", cell, BASELINE, 20, 800, 200) == pytest.approx(4 / (2 / t + 4 / t))


def test_cells_that_are_alike_are_measured_once():
    two = cells(names=("one", "two"))
    assert [(p.subject, p.batch_size) for p in probes_of(two)] == [
        (BASELINE, 10), (BASELINE, 20), ("impactx", 10), ("impactx", 20), (MAPS, 0)]
    own = cells("approaches.impactx.batch_size=32")
    assert ("impactx", 32) in [(p.subject, p.batch_size) for p in probes_of(own)]


def test_what_is_left_is_counted_and_priced(artifacts):
    (cell,) = cells()
    price = price_cell(cell, measured([cell]), artifacts)
    assert price.trials == exactly(4 + 2) and price.evaluations == Range(200_000, 200_000)
    assert price.map_bytes == 2 * 1000 * 3 * 32 * 32 * 4
    # Six epochs at least, thirty at most: 4 + 2 trials and 2 x 2 trainings.
    assert price.epochs == Range(6 * 10, 30 * 10)
    small, large = (2 / 3 * (steps + 0.2) for steps in (80, 40))
    found = {item.name: item for item in price.items}
    assert found["stage 1"].seconds.low == pytest.approx(6 * 2 * (small + large))
    assert found["stage 1"].seconds.high == pytest.approx(30 * 2 * (small + large))
    assert found["stage 1"].alone().low == pytest.approx(6 * small), "four slots, four trials: as long as the longest"
    assert found["stage 1"].alone().high == pytest.approx(30 * small)
    for name in ("A's trainings", "final models"):
        assert found[name].seconds.low == pytest.approx(6 * 2 * min(small, large))
        assert found[name].seconds.high == pytest.approx(30 * 2 * max(small, large))
        assert found[name].slots == 2, "A's come before maps and searches, the others after: not four at once"
    assert found["impactx's search"].slots == 2, "two trials cannot use four slots"
    assert found["maps on CPUs"].alone().low == pytest.approx(2000 / 15), "a store of two shards keeps two actors busy"
    text = price_list([price], measured([cell]), 3)
    assert "4 of 4 trials left" in text and "60 to 300 epochs" in text and "200,000 evaluations" in text
    assert "24.6 MB" in text


def test_what_exists_costs_nothing(artifacts):
    (cell,) = cells()
    finish_maps(cell, artifacts, repeats=[0])
    price = price_cell(cell, measured([cell]), artifacts)
    assert price.exists == "4 of stage 1, 1 of training A, 1 of maps" and price.trials == exactly(2)
    assert price.evaluations == Range(100_000, 100_000)
    found = {item.name: item for item in price.items}
    large = 2 / 3 * 40.2
    assert found["stage 1"].seconds == Range(0, 0)
    for name, left in (("A's trainings", 1), ("final models", 2)):
        assert found[name].seconds.low == pytest.approx(6 * left * large), "the selected point is known now"
        assert found[name].seconds.high == pytest.approx(30 * left * large)


def test_finished_work_of_stage_2_costs_nothing(artifacts):
    (cell,) = cells(JUDGED)
    rates, trained = measured([cell]), finish_maps(cell, artifacts)
    large = 2 / 3 * 40.2

    def priced():
        price = price_cell(cell, rates, artifacts)
        return price, {item.name: item for item in price.items}

    first, second = (cell.approach_trial("impactx", Candidate(weight), trained[0]) for weight in (0.4, 0.8))
    artifacts.finish(first, training(0.6))
    # A model of a point that may not be the selected one is not counted as done.
    artifacts.finish(cell.approach_model("impactx", Candidate(0.4), trained[0]), training(weights="x" * 64))
    price, found = priced()
    assert price.trials == exactly(1) and found["impactx's search"].seconds.low == pytest.approx(6 * large)
    assert "1 of stage 2 of impactx" in price.exists
    assert found["final models"].seconds.low == pytest.approx(6 * 2 * large)

    artifacts.finish(second, training(0.7))
    price, found = priced()
    assert price.trials == exactly(0) and "impactx's search" not in found
    assert price.epochs == Range(6 * 2, 30 * 2), "lambda = 0.8 is selected, and trained in no repeat"
    finals = [cell.approach_model("impactx", Candidate(0.8), a) for a in trained]
    artifacts.finish(finals[0], training(weights="y0" * 32))
    price, found = priced()
    assert price.epochs == Range(6, 30) and "1 of final trainings" in price.exists and found["judging"].slots == 4

    artifacts.finish(finals[1], training(weights="y1" * 32))
    for model in [*(a.step for a in trained), *finals]:
        assert priced()[1]["judging"].seconds.low > 0
        artifacts.finish(cell.map_quality(model, artifacts.result(model)), JUDGEMENT)
    price, found = priced()
    assert price.epochs == Range() and price.evaluations == Range() and "judging" not in found
    assert all(item.seconds == Range() for item in price.items) and "4 of map quality" in price.exists


def test_shards_that_are_there_cost_nothing(artifacts):
    (cell,) = cells("repeats=1", "maps.shard_size=300")
    finish_maps(cell, artifacts, repeats=[])
    step = cell.classifier(Configuration(0.002, 20, 0.2), 0)
    artifacts.finish(step, result := training(weights="w0" * 32))
    unit = cell.maps(Classifier(step, step.ref(result)), cell.settings.attribution)
    store = MapStore.create(artifacts.storage, unit.folder, StoreSpec(unit.key, 1000, (3, 32, 32), 300, {}))
    rates = measured([cell])
    assert price_cell(cell, rates, artifacts).evaluations == Range(100_000, 100_000)
    for shard, left in ((1, 700), (3, 600)):
        artifacts.storage.write(f"{unit.folder}/{store.shard_name(shard)}", b"")
        price = price_cell(cell, rates, artifacts)
        found = {item.name: item for item in price.items}
        assert price.evaluations == Range(100 * left, 100 * left) and price.map_bytes == left * 3 * 32 * 32 * 4
        # 30 maps a second of four actors; the last two shards keep two of them busy.
        assert found["maps on CPUs"].alone().low == pytest.approx(left / (15 if left == 600 else 22.5))
        assert found["maps on CPUs"].cpu_hours().low == pytest.approx(left / 7.5 / 3600)


def test_a_finished_store_that_lost_a_shard_is_completed(artifacts):
    (cell,) = cells("repeats=1", "maps.shard_size=300")
    (a,) = finish_maps(cell, artifacts, repeats=[0])
    assert price_cell(cell, measured([cell]), artifacts).evaluations == Range()
    unit = cell.maps(a, cell.settings.attribution)
    store = MapStore.open(artifacts.storage, unit.folder, unit.key)
    artifacts.storage.delete(f"{unit.folder}/{store.shard_name(3)}")
    price = price_cell(cell, measured([cell]), artifacts)
    assert price.evaluations == Range(10_000, 10_000) and "maps" not in price.exists
    artifacts.storage.write_json(f"{unit.folder}/store.json", {"format": 0})
    with pytest.raises(StoreError, match="store.json"):
        price_cell(cell, measured([cell]), artifacts)


def test_maps_that_a_training_makes_itself_are_priced(artifacts):
    approach = "approach=[single_stage]", "approaches.single_stage.lambdas=[0.4,0.8]"
    (cell,), (without,) = (cells(*approach, f"approaches.single_stage.explain_every={n}") for n in (2, 100))
    rates = measured([cell])
    (price, bare) = (price_cell(one, rates, artifacts) for one in (cell, without))
    # Of 800 images after every second epoch but the last: 2 rounds of 6 epochs, 14 of 30; 2 trials and 2 trainings.
    maps = Range(2 * 800, 14 * 800)
    assert price.evaluations == maps * (4 * 100) + bare.evaluations
    for name in ("single_stage's search", "final models"):
        some, none = ({item.name: item.seconds for item in one.items}[name] for one in (price, bare))
        expected = maps * (2 / (1.5 if name == "single_stage's search" else 0.75))
        assert (some.low - none.low, some.high - none.high) == pytest.approx((expected.low, expected.high))


def test_a_budget_bounds_trials_epochs_and_seconds(artifacts):
    (cell,) = cells("grid.max_hours=1", "grid.batch_size=[20]",
                    f"grid.learning_rate={[0.001 * k for k in range(1, 21)]}")
    trials = [cell.classifier_trial(point) for point in cell.configurations()]
    artifacts.finish(trials[2], training(seconds=3000))

    def stage1():
        price = price_cell(cell, measured([cell]), artifacts)
        later = 2 + 2 * 2  # trials and trainings of both repeats' A and IMPACTX
        return price.items[0], price.trials, price.epochs + Range(-6, -30) * later

    # 600 s are left, of 19 trials of 161 to 804 s in four slots: another begins after one of the longest, or three of
    # the shortest beside three that have trained nothing yet; four at most go on when the hours are over.
    epoch = 2 / 3 * 40.2
    item, count, epochs = stage1()
    assert count == Range(1 + 2, 7 + 2)
    assert item.text == "1 to 7 of 20 trials left, as 10 min 00 s of training are left (grid.max_hours)"
    assert (item.seconds.low, item.seconds.high) == pytest.approx((600, 600 + 4 * 30 * epoch))
    assert (epochs.low, epochs.high) == pytest.approx((600 / epoch, (600 + 4 * 30 * epoch) / epoch))
    assert item.alone().high == pytest.approx((600 + 4 * 30 * epoch) / 4 + 30 * epoch * 3 / 4)
    # Those that were begun go on, however many they are.
    for unit in trials[-9:]:
        artifacts.storage.write(f"{unit.folder}/{RUNNING}", b"")
    item, count, epochs = stage1()
    assert count == Range(9 + 2, 9 + 2) and (epochs.low, epochs.high) == pytest.approx((9 * 6, 9 * 30))
    assert (item.seconds.low, item.seconds.high) == pytest.approx((9 * 6 * epoch, 9 * 30 * epoch))
    artifacts.finish(trials[2], training(seconds=3600))
    assert stage1() == (replace(item, text=item.text.replace("10 min 00 s", "0.0 s")), count, epochs)
    for unit in trials[-9:]:
        artifacts.storage.delete(f"{unit.folder}/{RUNNING}")
    item, count, epochs = stage1()
    assert count == exactly(2) and item.seconds == Range() and epochs == Range()


def test_the_longest_trial_may_be_one_that_a_budget_leaves_out(artifacts):
    (cell,) = cells("grid.max_hours=0.01")
    item = price_cell(cell, measured([cell]), artifacts).items[0]
    small, large = (2 / 3 * (steps + 0.2) for steps in (80, 40))
    assert item.seconds.low == pytest.approx(6 * large), "what begins is trained to its end"
    assert item.seconds.high == pytest.approx(2 * 30 * (small + large))
    assert item.alone().low == pytest.approx(6 * large) and item.alone().high == pytest.approx(30 * small)


def test_a_budget_that_is_more_than_enough_changes_nothing(artifacts):
    (much,), (none,) = cells("grid.max_hours=1000"), cells()
    one, other = (price_cell(cell, measured([cell]), artifacts) for cell in (much, none))
    assert one.trials == other.trials and one.epochs == other.epochs
    assert (one.items[0].seconds.low, one.items[0].seconds.high) == pytest.approx(
        (other.items[0].seconds.low, other.items[0].seconds.high))


def test_no_step_is_shorter_than_its_longest_piece():
    item = Item("stage 1", "", "trial", Slots(64, 1, 0), Range(100, 700), 64, 70, Range(9, 60))
    assert item.alone() == Range(9, 700 / 64 + 60 * 63 / 64), "64 slots share few trials of unequal length"
    assert replace(item, pieces=5, slots=5).alone() == Range(20, 60), "all at once: as long as the longest"
    assert replace(item, longest=Range()).alone() == Range(100 / 64, 700 / 64)


def test_judging_is_counted_and_priced(artifacts):
    (cell,) = cells(JUDGED, "evaluation.attributions=[{method: grad_cam}]")
    assert [p.making.attribution.method for p in probes_of([cell]) if p.subject == JUDGING] == [
        "partition", "grad_cam"]
    price = price_cell(cell, measured([cell]), artifacts)
    item = {item.name: item for item in price.items}["judging"]
    # A: predicted and grad_cam (4 passes), and true where that is another class; impactx: of its A as well.
    maps = Range(2 * 100 * (104 + 204), 2 * 100 * (204 + 304))
    # 64 regions: A by those three, random and least relevant first; impactx by its own, of_a and mean_map besides.
    morf = 2 * 100 * (1 + 64 * 5 + 1 + 64 * 8)
    assert price.evaluations == Range(200_000, 200_000) + maps + Range(morf, morf)
    # 7.5 maps a second of a process, by either attribution; impactx runs A and a second network.
    a, net = Range(2, 3), Range(2 * 2 + 1, 2 * 3 + 1)
    passes = (1 + 64 * 5 + 2 * (1 + 64 * 8)) / 100
    expected = (a + net + Range(passes, passes)) * (2 * 100 / 7.5)
    assert (item.seconds.low, item.seconds.high) == pytest.approx((expected.low, expected.high))
    assert item.slots == 4 and item.cpu_hours().low == pytest.approx(expected.low / 3600)
    text = price_list([price], measured([cell]), 3)
    assert "judging:           maps of 4 of 4 models on 100 test images" in text
    (one,) = cells(JUDGED, "evaluation.approaches=[baseline]", "evaluation.orders=[predicted]")
    assert price_cell(one, measured([one]), artifacts).evaluations == Range(1, 1) * (
        200_000 + 2 * 100 * (100 + 1 + 64 * 3))
    (all_images,) = cells("evaluation.map_images=5000")
    assert "on 300 test images" in price_list([price_cell(all_images, measured([all_images]), artifacts)],
                                              measured([all_images]), 3)


def test_several_workers_hold_several_times_as_much(artifacts):
    (cell,) = cells()
    one, four = (measured([cell], workers=n) for n in (1, 4))
    assert four.epoch("trial", cell, BASELINE, 20, 800, 200) == pytest.approx(
        one.epoch("trial", cell, BASELINE, 20, 800, 50)), "each step is theirs, and a part of the validation images"
    item = price_cell(cell, four, artifacts).items[0]
    assert item.cpu_hours().low == pytest.approx(item.seconds.low * 4 / 3600)


def test_slots_hold_all_their_workers(monkeypatch):
    ray = pytest.importorskip("ray")
    from impactx.cluster import measuring

    nodes = [{"NodeID": str(k), "Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}}
             for k, (cpus, gpus) in enumerate([(6, 1), (6, 1), (3, 0)])]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 15, "GPU": 2})
    tried = []

    def gang(where, probes, place, setting):
        tried.append((where.gpus, where.on_node, where.workers, [probe.subject for probe in probes]))
        return [(probe, [1.0]) for probe in probes]

    monkeypatch.setattr(measuring, "_gang", gang)
    (cell,) = cells(JUDGED, "cluster.max_concurrent_trials=2",
                    "models.lenet5.resources={trial: {gpus: 0, workers: 4}, training: {workers: 2}}")
    settings, model = cell.settings.cluster, cell.model.resources

    def slots(settings, model):
        tried.clear()
        return measuring.measure(probes_of([cell]), settings, None, {"lenet5": model}, lambda text: None).slots["lenet5"]

    found = slots(settings, model)
    assert found["trial"] == Slots(2, 4, 0, 4), "eight of fifteen CPUs: no more than two trials at once"
    assert found["model"] == Slots(1, 2, 2, 2) and found[JUDGING] == Slots(15, 1, 0)
    assert found["maps on GPUs"] == Slots(2, 1, 1) and "maps on CPUs" not in found, "trials hold all CPUs"
    assert (1, 1, 1, [MAPS]) in tried
    shared = model.model_copy(update={"trial": model.training.model_copy(update={"gpus": 0.25, "workers": 1})})
    found = slots(settings, shared)
    assert found[JUDGING] == Slots(8, 1, 0.25), "four on each GPU"
    assert found["maps on CPUs"] == Slots(7, 1, 0), "eight trials may be on the GPUs"
    found = slots(settings.model_copy(update={"max_concurrent_trials": None}), model.on_cpus())
    assert found["trial"] == Slots(3, 4, 0, 4) and found["maps on CPUs"] == Slots(15, 1, 0)
    assert "maps on GPUs" not in found
    assert sum(what == [MAPS] for *_, what in tried) == 2, "judged where maps are made: measured once a kind of node"


def test_a_worker_is_measured_on_its_share_of_a_batch(monkeypatch):
    pytest.importorskip("ray")
    from impactx.cluster import measuring

    monkeypatch.setattr(measuring, "measure_training", lambda cell, place, subject, batch_size, device: batch_size)
    (cell,) = cells()
    where = measuring.Place("node", 1, 0, 4, 4)
    sizes = {(n, size): measuring.Prober().run(Probe(cell, BASELINE, size), None, replace(where, workers=n), "cpu")
             for n in (1, 4) for size in (1, 4, 10)}
    assert sizes == {(1, 1): 1, (1, 4): 4, (1, 10): 10, (4, 1): 1, (4, 4): 2, (4, 10): 3}


def test_what_the_plan_knows_of_a_model_is_true():
    settings = load_settings("full_grid", ["model=lenet5", "approach=[impactx,abn,single_stage,ensemble]"], CONFIGS)
    cell = Cell(settings, settings.datasets["cifar10"], settings.models["lenet5"], FACTS)
    a = build_classifier(cell.model, 10, (32, 32), seed=0)
    nets = {"impactx": cell.settings.approaches["impactx"].build(cell.model, a, seed=1),
            "abn": cell.settings.approaches["abn"].build(cell.model, 10, (32, 32), seed=0),
            "single_stage": cell.settings.approaches["single_stage"].build(cell.model, 10, (32, 32),
                                               seed=0),
            "ensemble": EnsembleNetwork([a, a])}
    assert {name: approach.makes_maps for name, approach in cell.approaches.items()} == {
        name: hasattr(net, "with_maps") for name, net in nets.items()}


def test_strategies_cost_less(artifacts):
    (cell,) = cells("grid.strategy=random", "grid.max_trials=3")
    assert price_cell(cell, measured([cell]), artifacts).trials == exactly(3 + 2)
    (cell,) = cells("grid.strategy=asha", "grid.grace_epochs=2")
    assert price_cell(cell, measured([cell]), artifacts).epochs == Range(2 * 4 + 6 * 6, 30 * 10)


@pytest.mark.parametrize("on_gpu, priced", [(1.9, True), (2.0, False)])
def test_maps_are_priced_on_cpus_beside_gpus_only_where_these_shorten_the_end(artifacts, on_gpu, priced):
    (cell,) = cells("maps.shard_size=200")  # five shards
    rates = measured([cell])
    slots = rates.slots["lenet5"] | {"maps on CPUs": Slots(1, 1, 0), "maps on GPUs": Slots(1, 1, 1)}
    rates = Measured({"lenet5": slots}, 4, 1, rates._trainings)
    for probe in probes_of([cell]):
        if probe.subject == MAPS:
            rates.add_maps("maps on CPUs", probe, 1, [1.0])
            rates.add_maps("maps on GPUs", probe, 1, [on_gpu])
            wanted = probe.making
    assert set(rates.maps(cell, wanted)) == {"maps on CPUs", "maps on GPUs"}
    names = {item.name for item in price_cell(cell, rates, artifacts).items}
    assert "maps on GPUs" in names and ("maps on CPUs" in names) is priced


def test_gpus_are_priced_by_the_part_that_is_held(artifacts):
    (cell,) = cells()
    rates = measured([cell], gpus=0.25)
    item = price_cell(cell, rates, artifacts).items[0]
    assert item.gpu_hours().low == pytest.approx(item.cpu_hours().low / 4)
    assert "GPU-hours" in price_list([price_cell(cell, rates, artifacts)], rates, 3)


def test_cells_that_share_a_cluster_take_no_longer_than_one_by_one(artifacts):
    two = cells(names=("one", "two"))
    rates = measured(two)
    one = price_list([price_cell(two[0], rates, artifacts)], rates, 3)
    both = price_list([price_cell(cell, rates, artifacts) for cell in two], rates, 3)
    assert one != both and both.count("alone on this cluster") == 2
    sums = "{} trials, {} to {} epochs, {} evaluations, maps of at most {} MB"
    assert both.count("  together: " + sums.format(6, 60, 300, "200,000", 24.6)) == 2
    assert "in all: " + sums.format(12, 120, 600, "400,000", 49.2) in both
    assert both.count(" CPU-hours, 0.00 GPU-hours") == 3


def test_cells_take_as_long_as_their_number_at_once_and_the_trials_of_all_allow(artifacts):
    cell, slots = cells()[0], {"trial": Slots(2, 1, 0), "model": Slots(8, 1, 0)}
    rates = Measured({"lenet5": slots}, 8, 0)

    def price(trials: float, models: float) -> CellPrice:
        return CellPrice(cell, [Item("stage 1", "", "trial", slots["trial"], Range(trials, trials), 2, 2),
                                Item("final models", "", "model", slots["model"], Range(models, models), 2, 2)],
                         exactly(1), Range(), Range(), 0, {}, "")

    def whole(at_once: int, *prices: CellPrice) -> str:
        return price_list(prices, rates, at_once).partition("in all: ")[2].splitlines()[2].strip().partition(" on")[0]

    four = [price(20, 60)] * 4  # each 10 s and 30 s, with two slots
    assert whole(1, *four) == "2 min 40 s", "one after the other: the sum"
    assert whole(2, *four) == "1 min 20 s to 2 min 40 s"
    assert whole(3, *four) == "53.3 s to 2 min 40 s"
    assert whole(9, *four) == "40.0 s to 2 min 40 s", "the trials of all in two slots, as long as one cell"
    assert whole(9, *[price(60, 20)] * 4) == "2 min 00 s to 2 min 40 s", "max_concurrent_trials is of all cells"
