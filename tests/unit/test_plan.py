"""Fingerprints: what changes a unit's key and what does not; and which candidate is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from impactx.configuration import ConfigurationError, load_settings
from impactx.experiment.plan import Cell, DataFacts, SelectionError, select
from impactx.experiment.run import job_key
from impactx.experiment.units import Artifacts, Unit, fingerprint
from impactx.storage import Storage, StorageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FACTS = DataFacts("d" * 64, 1437, 10, (32, 32), tuple("0123456789"))


def cell(*overrides: str, facts: DataFacts = FACTS, weights_file: str | None = None) -> Cell:
    s = load_settings("demo", ["repeats=2", *overrides], CONFIGS)
    return Cell(s, s.datasets["digits"], s.models["lenet5"], facts, weights_file)


def keys(cell: Cell) -> dict[str, list[str]]:
    """The keys of all units, by step; the results that the later ones depend on are the same in every cell."""
    c = cell.configurations()[0]
    a = cell.stage1_model(c, 0)
    maps = cell.maps(a, {"weights": "w" * 64}, 0)
    final, search = [], []
    for name, approach in cell.settings.approaches.items():
        search += cell.stage2_trials(name, approach, c, a, maps)
        final.append(cell.stage2_model(name, approach, c, approach.lambdas[0], 1, a, maps))
    return {"trials": [u.key for u in cell.stage1_trials()], "a": [cell.stage1_model(c, r).key for r in (0, 1)],
            "maps": [maps.key], "search": [u.key for u in search], "stage2": [u.key for u in final],
            "test": [cell.test(final[0], {"weights": "v" * 64}).key]}


BEFORE = keys(cell())


def changed(*overrides: str, **how) -> set[str]:
    after = keys(cell(*overrides, **how))
    for step in after:
        assert len(set(after[step])) == len(after[step]), f"two units of {step} have one key"
    return {step for step in after if after[step] != BEFORE[step]}


@pytest.mark.parametrize("override", [
    "output=/elsewhere", "data_root=/data", "cache=/cache", "name=other", "cluster.trial_cpus=2", "cluster.threads=3",
    "cluster.use_gpu=true", "tracking.enabled=false", "training.eval_batch_size=7", "training.compile=always",
    "training.keep_trial_weights=true", "training.memory_mb=64", "repeats=5", "maps.shard_size=7",
    "grid.select_on=own", "datasets.digits.path=/there", "cluster.explain_memory_mb=64"])
def test_where_and_by_what_it_is_done_changes_no_key(override):
    assert changed(override) == set()


TRAININGS = {"trials", "a", "search", "stage2"}
MAPS = {"maps", "search", "stage2"}


@pytest.mark.parametrize("override, steps", [
    ("seed=1", TRAININGS), ("training.epochs=21", TRAININGS), ("training.patience=7", TRAININGS),
    ("training.optimizer=sgd", TRAININGS), ("training.precision=float64", TRAININGS),
    ("datasets.digits.augmentation.shift=1", TRAININGS), ("models.lenet5.input_size=40", TRAININGS | {"maps"}),
    ("grid.learning_rate=[0.002]", TRAININGS), ("grid.batch_size=[16]", TRAININGS),
    ("grid.validation_fraction=[0.1]", {"trials"}), ("grid.validation_fraction=[0.05,0.1]", TRAININGS),
    ("attribution.max_evals=100", MAPS), ("attribution.batch_size=7", MAPS), ("attribution.explain=probability", MAPS),
    ("maps.scale=raw", {"search", "stage2"}), ("approaches.impactx.lambdas=[0.2,0.4]", {"search", "stage2"}),
    ("approaches.impactx.latent=64", {"search", "stage2"}), ("approaches.impactx.m=penultimate", {"search", "stage2"}),
    ("approaches.impactx.learning_rate=0.003", {"search", "stage2"}),
    ("approaches.impactx.learning_rate=0.001", set()),  # the one selected for A, said aloud
])
def test_a_setting_changes_exactly_the_keys_that_depend_on_it(override, steps):
    assert changed(override) == steps


def test_other_data_and_other_weights_change_what_they_should():
    everything = set(BEFORE)
    assert changed(facts=DataFacts("e" * 64, 1437, 10, (32, 32), FACTS.class_names)) == everything
    assert changed(facts=replace(FACTS, test_fingerprint="t" * 64)) == {"test"}
    assert changed(weights_file="f" * 64) == TRAININGS
    c = cell()
    a = c.stage1_model(c.configurations()[0], 0)
    assert c.maps(a, {"weights": "x"}, 0).key != c.maps(a, {"weights": "y"}, 0).key


def test_one_lambda_needs_no_search_and_a_shared_recipe_is_one_unit():
    c = cell("approach=[impactx]", "approaches.impactx.lambdas=[0.8]", "approaches.twin={lambdas: [0.8]}")
    point = c.configurations()[0]
    a = c.stage1_model(point, 0)
    maps = c.maps(a, {"weights": "w"}, 0)
    made = {name: c.stage2_model(name, x, point, 0.8, 0, a, maps) for name, x in c.settings.approaches.items()}
    assert c.stage2_trials("impactx", c.settings.approaches["impactx"], point, a, maps) == []
    assert made["impactx"].key == made["twin"].key and made["impactx"].params["approach"] == "impactx"


def test_the_grid_is_the_product_in_a_fixed_order():
    found = cell("grid.batch_size=[16,32]").configurations()
    assert len(found) == 8 and [tuple(vars(c).values()) for c in found[:3]] == [
        (0.001, 16, 0.1), (0.001, 16, 0.2), (0.001, 32, 0.1)]
    assert {u.recipe["split"]["common_fraction"] for u in cell().stage1_trials()} == {0.1}


def test_job_keys_name_the_experiment_not_its_execution():
    def of(*overrides):
        return job_key(load_settings("demo", overrides, CONFIGS))

    assert of() == of("output=/x", "cluster.threads=4", "tracking.enabled=false", "training.compile=always",
                      "training.memory_mb=100", "data_root=/d", "cache=/c")
    assert len({of(), of("seed=1"), of("training.epochs=3"), of("approaches.impactx.lambdas=[0.2]"), of("name=x")}) == 5


def test_fingerprints_do_not_depend_on_the_order_of_keys_and_refuse_nan():
    assert fingerprint({"a": 1, "b": [0.1]}) == fingerprint({"b": [0.1], "a": 1}) != fingerprint({"a": 1, "b": [0.2]})
    assert len(fingerprint({})) == 32
    with pytest.raises(ValueError):
        fingerprint({"a": float("nan")})


def unit(name: str) -> Unit:
    return Unit("trial", name, {"name": name})


def result(accuracy: float, loss: float, **more) -> dict:
    return {"best": {"val_accuracy": accuracy, "common_accuracy": 1 - accuracy, "val_loss": loss} | more}


def test_selection_is_by_accuracy_then_loss_then_order():
    units = [unit(n) for n in "abcd"]

    def chosen(*results, metric="val_accuracy"):
        found = {u.key: r for u, r in zip(units, results, strict=False) if r is not None}
        return select(units, found, metric)[0].name

    assert chosen(result(0.5, 1), result(0.9, 9), result(0.8, 0)) == "b"
    assert chosen(result(0.5, 1), result(0.9, 9), result(0.8, 0), metric="common_accuracy") == "a"
    assert chosen(result(0.9, 2), result(0.9, 1), result(0.9, 3)) == "b"
    assert chosen(result(0.9, 1), result(0.9, 1)) == "a"
    assert chosen(None, {"best": None}, result(0.1, 5)) == "c"
    # A larger lambda makes the whole loss larger whatever the classifier is worth: the cross entropy decides.
    assert chosen(result(0.9, 1.0, val_ce=0.4, val_mse=3.0), result(0.9, 2.0, val_ce=0.3, val_mse=1.2)) == "b"


def test_no_candidate_is_an_error_with_the_reasons():
    units = [unit(n) for n in "abcdefgh"]
    with pytest.raises(SelectionError) as caught:
        select(units, {units[0].key: {"best": None}}, "val_accuracy", {n: f"disk {n} is full" for n in "bcdefgh"})
    text = str(caught.value)
    assert "none of 8 trials" in text and "7 failed and 1 diverged" in text
    assert "b: disk b is full" in text and "and 3 more" in text


def test_results_are_found_again_and_damage_is_named(tmp_path):
    artifacts, u = Artifacts(Storage(tmp_path)), unit("x")
    assert artifacts.result(u) is None
    artifacts.storage.write(f"{u.folder}/running.pt", b"state")
    artifacts.finish(u, {"best": None}, {"checkpoint.pt": b"weights"})
    assert sorted(p.name for p in (tmp_path / u.folder).iterdir()) == ["checkpoint.pt", "result.json"]
    assert artifacts.result(u) == {"name": "x", "recipe": {"name": "x"}, "best": None}
    path = tmp_path / u.folder / "result.json"
    path.write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(StorageError, match=f"{path} is damaged"):
        artifacts.result(u)


# ---- how much of the grid

GRID = ("grid.learning_rate=[0.001,0.002,0.003,0.004]", "grid.batch_size=[16,32]", "grid.validation_fraction=[0.1,0.2]")


def names(*overrides):
    return [unit.name for unit in cell(*GRID, *overrides).stage1_trials()]


def test_a_drawn_part_of_the_grid_is_the_same_each_time_and_another_for_another_seed():
    everything = names()
    drawn = names("grid.strategy=random", "grid.max_trials=5")
    assert len(drawn) == len(set(drawn)) == 5 and set(drawn) < set(everything)
    assert drawn == names("grid.strategy=random", "grid.max_trials=5") == names("grid.max_trials=5")
    assert drawn != names("grid.strategy=random", "grid.max_trials=5", "seed=1")
    assert drawn == names("grid.strategy=random", "grid.max_trials=9")[:5], "a larger part holds the smaller one"
    assert drawn != everything[:5], "the first of a grid are all alike"


@pytest.mark.parametrize("override", ["grid.strategy=asha", "grid.max_hours=1", "grid.max_trials=99"])
def test_a_strategy_changes_the_order_and_no_unit(override):
    plain, other = cell(*GRID).stage1_trials(), cell(*GRID, override).stage1_trials()
    assert [u.key for u in plain] != [u.key for u in other]
    assert {u.key for u in plain} == {u.key for u in other} and len(plain) == 16


def test_what_stopped_a_trial_is_known_by_all_that_decides_it():
    def halving(*overrides):
        return cell(*GRID, "grid.strategy=asha", *overrides).stage1_trials()[0].inputs["halving"]

    assert halving() == halving("grid.strategy=asha")
    for other in ("grid.grace_epochs=2", "grid.reduction=2", "grid.select_on=own", "training.epochs=30",
                  "grid.batch_size=[16]"):
        assert halving(other) != halving(), other
    assert "halving" not in cell(*GRID).stage1_trials()[0].inputs


def test_strategies_that_cannot_be_are_refused():
    with pytest.raises(ConfigurationError, match="'random' needs max_trials"):
        cell("grid.strategy=random")
    with pytest.raises(ConfigurationError, match="'asha' with cluster.trial_workers = 2"):
        cell("grid.strategy=asha", "cluster.trial_workers=2")
