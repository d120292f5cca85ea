"""Fingerprints: what changes a unit's key and what does not; and which candidate is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from impactx.experiment.plan import Cell, Configuration, DataFacts, SelectionError, select
from impactx.experiment.run import job_key
from impactx.experiment.stage2 import roles
from impactx.experiment.units import Artifacts, Unit, fingerprint

from impactx.approaches.base import Candidate
from impactx.configuration import ConfigurationError, load_settings
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
    result = {"weights": "w" * 64}
    maps = cell.maps(a, result, 0)
    final, search = [], []
    for approach in cell.approaches():
        search += [unit for unit, _ in approach.trials(cell.basis(c, a, result, 0))]
        final.append(approach.model(cell.basis(c, a, result, 1), approach.approach.candidates()[0]))
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
    "cluster.use_gpu=true", "cluster.trial_gpus=0.25", "model=[lenet5,mobilenet]",
    "tracking.enabled=false", "training.eval_batch_size=7", "training.compile=always",
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
    basis = c.basis(point, c.stage1_model(point, 0), {"weights": "w"}, 0)
    made = {x.name: x.model(basis, x.approach.candidates()[0]) for x in c.approaches()}
    assert all(x.trials(basis) == [] for x in c.approaches())
    assert made["impactx"].key == made["twin"].key and made["impactx"].params["approach"] == "impactx"


# ---- keys of finished work

# Written down from the version before approaches had kinds: whoever changes one makes users' finished work void.
FROZEN = {"A": "2584eaaecab71b4ff854546911579120", "maps": "17022e6bc93543cc598a0dd07ebd1789",
          "impactx": "d264501daa12423fdc0be01b63de262a", "lambda0": "99a85aecf27b254cc7cded76111460c8",
          "trials": ["bb758a2c3031a9ff0603052b5a6aacb0", "b022568505a7f866c95f51315fbb3dd6",
                     "1e3b660e9dae6dbe361f6912f3b3837c", "686ca4dbbcd5805642df760a6d382af4",
                     "c93aa73617e4e5bb04fa1a92d2e0723b", "46bdfcb681868890b29c93adcdbe8cdc",
                     "076d695ab98cb902f20c29581e61de81"],
          "test": "9465f0739e893322cc6c46a7abbbbf38"}


def cifar(approach: str = "approach=[impactx,lambda0]", *overrides: str) -> Cell:
    s = load_settings("full_grid", ["dataset=cifar10", "model=lenet5", approach, *overrides], CONFIGS)
    return Cell(s, s.datasets["cifar10"], s.models["lenet5"],
                DataFacts("d" * 64, 50_000, 10, (32, 32), tuple("0123456789")))


def basis_of(c: Cell, repeat: int = 1):
    point = Configuration(0.0016, 32, 0.1)
    return c.basis(point, c.stage1_model(point, repeat), {"weights": "w" * 64}, repeat)


def test_finished_work_keeps_its_keys():
    c = cifar()
    basis = basis_of(c)
    impactx, lambda0 = c.approaches()
    model = impactx.model(basis, Candidate(0.8))
    assert FROZEN == {
        "A": basis.a.key, "maps": basis.maps().key, "impactx": model.key,
        "lambda0": lambda0.model(basis, Candidate(0.0)).key,
        "trials": [unit.key for unit, _ in impactx.trials(basis_of(c, 0))],
        "test": c.test(model, {"weights": "v" * 64}).key}
    assert impactx.stores(basis) == [basis.maps()] and basis.maps().name == "maps repeat 1"
    assert model.name == "impactx lambda=0.8 repeat 1" and model.folder == f"models/{FROZEN['impactx']}"


ALL = ("approach=[impactx,shuffled,shuffled_in_class,mean_map,class_mean_map,integrated_gradients,abn,wae,ensemble,"
       "single_stage]")


def test_every_approach_is_a_unit_of_its_own_and_only_some_need_maps():
    c = cifar(ALL)
    bases = [basis_of(c, 0), basis_of(c, 1)]
    found = {a.name: [a.model(b, a.approach.candidates()[0]) for b in bases] for a in c.approaches()}
    assert len({u.key for units in found.values() for u in units}) == 20
    stores = {a.name: [u.name for u in a.stores(bases[1])] for a in c.approaches()}
    of_a = ["maps repeat 1"]
    assert stores == {
        "impactx": of_a, "shuffled": of_a, "shuffled_in_class": of_a, "mean_map": of_a, "class_mean_map": of_a,
        "integrated_gradients": ["maps by integrated_gradients repeat 1"], "abn": [], "ensemble": [],
        "wae": ["class-weighted maps repeat 1", "class-weighted maps of test images repeat 1"], "single_stage": []}
    keys = [u.key for a in c.approaches() for u in a.stores(bases[1])]
    assert len(set(keys)) == 4 and keys.count(FROZEN["maps"]) == 5
    for name in ("mean_map", "integrated_gradients"):  # one lambda, fixed beforehand, for other controls
        assert found[name][0].recipe["lambda"] == 0.8 and not next(
            a for a in c.approaches() if a.name == name).trials(bases[0])
    assert json.dumps([u.inputs for units in found.values() for u in units])


@pytest.mark.parametrize("override, changed", [
    ("approaches.shuffled.maps=mean", {"shuffled"}),
    ("approaches.integrated_gradients.attribution.steps=9", {"integrated_gradients"}),
    ("attribution.max_evals=99", {"impactx", "shuffled", "shuffled_in_class", "mean_map", "class_mean_map", "wae",
                                  "single_stage"}),
    ("approaches.wae.attribution={method: occlusion}", {"wae"}),
    ("approaches.single_stage.explain_every=2", {"single_stage"}), ("approaches.single_stage.auxiliary=0.3",
                                                                    {"single_stage"}),
    ("approaches.abn.learning_rate=0.01", {"abn"}), ("approaches.abn.learning_rate_factors=[1.0, 2.0]", set()),
    ("approaches.wae.latent=64", {"wae"}), ("maps.scale=raw", {
        "impactx", "shuffled", "shuffled_in_class", "mean_map", "class_mean_map", "integrated_gradients", "wae",
        "single_stage"}),
])
def test_a_setting_of_an_approach_changes_that_approach(override, changed):
    def found(c):
        return {a.name: a.model(basis_of(c), a.approach.candidates()[0]).key for a in c.approaches()}

    before, after = found(cifar(ALL)), found(cifar(ALL, override))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_search_over_learning_rates_multiplies_the_selected_one():
    c = cifar("approach=[abn]", "approaches.abn.learning_rate_factors=[0.5, 1.0, 2.0]")
    [abn] = c.approaches()
    trials = abn.trials(basis_of(c, 0))
    assert [u.recipe["learning_rate"] for u, _ in trials] == [0.0008, 0.0016, 0.0032]
    assert [u.name for u, _ in trials] == ["abn rate x0.5", "abn rate x1", "abn rate x2"]
    assert abn.model(basis_of(c, 0), trials[1][1]).key == abn.model(basis_of(cifar("approach=[abn]"), 0),
                                                                    Candidate()).key


def test_factors_of_the_learning_rate_are_candidates_beside_lambda():
    c = cifar("approach=[lambda0]", "approaches.lambda0.learning_rate_factors=[0.5, 1.0]")
    [lambda0] = c.approaches()
    trials = lambda0.trials(basis_of(c, 0))
    assert [u.recipe["learning_rate"] for u, _ in trials] == [0.0008, 0.0016]
    assert [u.name for u, _ in trials] == ["lambda0 lambda=0 rate x0.5", "lambda0 lambda=0"]
    assert lambda0.model(basis_of(c, 1), trials[1][1]).key == FROZEN["lambda0"]


@pytest.mark.parametrize("preset", ["full_grid", "table2", "controls", "cifar10-lenet5", "demo"])
def test_no_preset_gives_impactx_more_candidates_than_what_it_is_compared_with(preset):
    found = roles(load_settings(preset).model_dump(mode="json"))
    compared = {name: role.candidates for name, role in found.items() if role.kind in ("a", "no_maps", "shuffled")
                or name in ("abn", "wae")}
    assert {n for n in compared.values() if n} == {found["impactx"].candidates}, compared


def test_the_second_member_of_an_ensemble_has_a_seed_that_no_repeat_has():
    c = cifar("approach=[ensemble]", "repeats=5")
    found = [c.approaches()[0].model(basis_of(c, r), c.approaches()[0].approach.candidates()[0]).recipe for r in range(5)]
    assert len({r["second_seed"] for r in found}) == 5 and not {r["second_seed"] for r in found} & set(range(5))
    assert [r["split"]["seed"] for r in found] == [0, 1, 2, 3, 4]


def test_the_test_of_wae_depends_on_the_maps_of_the_test_images():
    c = cifar("approach=[wae]")
    wae = c.approaches()[0]
    model = wae.model(basis_of(c), wae.approach.candidates()[0])
    test, store = c.test(model, {"weights": "v"}), wae.stores(basis_of(c))[1]
    assert test.recipe["maps"] == store.key and test.inputs["maps"] == store.folder
    assert store.inputs["part"] == "test" and store.recipe["target"] == "class_weighted"


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
