"""What changes a step's key and what does not; and which trial is selected."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from impactx.approaches.base import Candidate
from impactx.configuration import ConfigurationError, load_settings
from impactx.experiment.artifacts import Artifacts
from impactx.experiment.cell import Cell, Classifier, Configuration, DataFacts
from impactx.experiment.flow import approach_search, flow
from impactx.experiment.groups import Outcomes, SelectionError, select
from impactx.experiment.steps.base import fingerprint
from impactx.experiment.steps.training import TrainingResult, Trial
from impactx.results.evidence import roles
from impactx.run.job import job_key
from impactx.storage import Storage, StorageError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FACTS = DataFacts("d" * 64, 1437, 10, (32, 32), tuple("0123456789"))


def cell(*overrides: str, facts: DataFacts = FACTS, **model: str) -> Cell:
    s = load_settings("demo", ["repeats=2", *overrides], CONFIGS)
    return Cell(s, s.datasets["digits"], s.models["lenet5"].model_copy(update=model), facts)


def trained(weights: str | None = "w" * 64, best: dict | None = None) -> TrainingResult:
    return TrainingResult(seconds=1, best=best, best_epoch=1, epochs=1, history=[], diverged=best is None,
                          weights=weights, train_images=9, validation_images=3, seconds_this_process=1)


def classifier(c: Cell, point: Configuration, repeat: int = 0, weights: str = "w" * 64) -> Classifier:
    """A trained A; the result that later steps depend on is the same in every cell."""
    step = c.classifier(point, repeat)
    return Classifier(step, step.ref(trained(weights)))


def stage1(c: Cell) -> list[Trial]:
    """The trials that the flow asks for first."""
    return asked(flow(c))


def asked(requests: Generator) -> list[Trial]:
    """The steps of the first group that a flow asks for; none where it asks for nothing."""
    group = next(requests, None)
    return [] if group is None else list(group.steps)


def search_of(c: Cell, name: str, a: Classifier) -> list[Trial]:
    """The trials that the flow asks for to search an approach; none where it searches nothing."""
    return asked(approach_search(c, name, a))


def first_model(c: Cell, name: str, a: Classifier):
    return c.approach_model(name, c.approaches[name].candidates()[0], a)


def keys(c: Cell) -> dict[str, list[str]]:
    """The keys of all steps, by what they do."""
    point = c.configurations()[0]
    a, other = classifier(c, point), classifier(c, point, 1)
    final = [first_model(c, name, other) for name in c.approaches]
    return {"trials": [step.key for step in stage1(c)], "a": [a.step.key, other.step.key],
            "maps": [c.maps(a, c.settings.attribution).key],
            "search": [step.key for name in c.approaches for step in search_of(c, name, a)],
            "stage2": [step.key for step in final], "test": [c.test(final[0], trained("v" * 64)).key]}


BEFORE = keys(cell())


def changed(*overrides: str, **how) -> set[str]:
    after = keys(cell(*overrides, **how))
    for step in after:
        assert len(set(after[step])) == len(after[step]), f"two steps of {step} have one key"
    return {step for step in after if after[step] != BEFORE[step]}


@pytest.mark.parametrize("override", [
    "output=/elsewhere", "data_root=/data", "cache=/cache", "name=other", "cluster.device=cpu", "cluster.threads=3",
    "models.lenet5.resources.trial.cpus=2", "models.lenet5.resources.maps={gpus: 0.5}", "model=[lenet5,mobilenet]",
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
    assert changed(weights="a.pth", weights_sha256="f" * 64) == TRAININGS
    assert cell(weights="b.pth", weights_sha256="f" * 64).network == cell(weights="a.pth", weights_sha256="f" * 64).network
    c = cell()
    x, y = (c.maps(classifier(c, c.configurations()[0], weights=w), c.settings.attribution) for w in "xy")
    assert x.key != y.key


def test_one_candidate_needs_no_search_and_a_shared_recipe_is_one_step():
    c = cell("approach=[impactx]", "approaches.impactx.lambdas=[0.8]", "approaches.twin={lambdas: [0.8]}")
    a = classifier(c, c.configurations()[0])
    impactx, twin = (first_model(c, name, a) for name in ("impactx", "twin"))
    assert impactx.key == twin.key
    assert search_of(c, "impactx", a) == search_of(c, "twin", a) == []
    with pytest.raises(StopIteration) as end:
        next(approach_search(c, "impactx", a))
    assert end.value.value == Candidate(0.8), "it is selected unasked"
    assert (impactx.parameters()["approach"], twin.parameters()["approach"]) == ("impactx", "twin")


def cifar(approach: str = "approach=[impactx,lambda0]", *overrides: str) -> Cell:
    s = load_settings("full_grid", ["dataset=cifar10", "model=lenet5", approach, *overrides], CONFIGS)
    return Cell(s, s.datasets["cifar10"], s.models["lenet5"],
                DataFacts("d" * 64, 50_000, 10, (32, 32), tuple("0123456789")))


def a_of(c: Cell, repeat: int = 1) -> Classifier:
    return classifier(c, Configuration(0.0016, 32, 0.1), repeat)


def test_a_key_is_the_fingerprint_of_kind_recipe_and_code():
    c = cifar()
    model = c.approach_model("impactx", Candidate(0.8), a_of(c))
    assert model.key == fingerprint({"kind": "model", "recipe": model.recipe, "code": model.code})
    assert model.name == "impactx lambda=0.8 repeat 1" and model.folder == f"models/{model.key}"
    assert c.maps_of("impactx", a_of(c)) == [c.maps(a_of(c), c.settings.attribution)]
    assert c.maps_of("impactx", a_of(c))[0].name == "maps repeat 1"


ALL = ("approach=[impactx,shuffled,shuffled_in_class,mean_map,class_mean_map,integrated_gradients,abn,wae,ensemble,"
       "single_stage]")


def test_every_approach_is_a_step_of_its_own_and_only_some_need_maps():
    c = cifar(ALL)
    found = {name: [first_model(c, name, a_of(c, repeat)) for repeat in (0, 1)] for name in c.approaches}
    assert len({step.key for steps in found.values() for step in steps}) == 20
    stores = {name: c.maps_of(name, a_of(c)) for name in c.approaches}
    of_a = ["maps repeat 1"]
    assert {name: [step.name for step in steps] for name, steps in stores.items()} == {
        "impactx": of_a, "shuffled": of_a, "shuffled_in_class": of_a, "mean_map": of_a, "class_mean_map": of_a,
        "integrated_gradients": ["maps by integrated_gradients repeat 1"], "abn": [], "ensemble": [],
        "wae": ["class-weighted maps repeat 1", "class-weighted maps of test images repeat 1"], "single_stage": []}
    keys = [step.key for steps in stores.values() for step in steps]
    assert len(set(keys)) == 4 and keys.count(stores["impactx"][0].key) == 5
    for name in ("mean_map", "integrated_gradients"):  # one lambda, fixed beforehand, for other controls
        assert found[name][0].candidate.weight == 0.8 and not search_of(c, name, a_of(c, 0))
    assert json.dumps([step.inputs() for steps in found.values() for step in steps])


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
        return {name: first_model(c, name, a_of(c)).key for name in c.approaches}

    before, after = found(cifar(ALL)), found(cifar(ALL, override))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_search_over_learning_rates_multiplies_the_selected_one():
    c = cifar("approach=[abn]", "approaches.abn.learning_rate_factors=[0.5, 1.0, 2.0]")
    trials = search_of(c, "abn", a_of(c, 0))
    assert [trial.learning_rate for trial in trials] == [0.0008, 0.0016, 0.0032]
    assert [trial.name for trial in trials] == ["abn rate x0.5", "abn", "abn rate x2"]
    alone = cifar("approach=[abn]")
    assert c.approach_model("abn", trials[1].candidate, a_of(c, 0)).key == alone.approach_model(
        "abn", Candidate(), a_of(alone, 0)).key


def test_factors_of_the_learning_rate_are_candidates_beside_lambda():
    c = cifar("approach=[lambda0]", "approaches.lambda0.learning_rate_factors=[0.5, 1.0]")
    trials = search_of(c, "lambda0", a_of(c, 0))
    assert [trial.learning_rate for trial in trials] == [0.0008, 0.0016]
    assert [trial.name for trial in trials] == ["lambda0 lambda=0 rate x0.5", "lambda0 lambda=0"]
    alone = cifar()
    assert c.approach_model("lambda0", trials[1].candidate, a_of(c)).key == alone.approach_model(
        "lambda0", Candidate(0.0), a_of(alone)).key


@pytest.mark.parametrize("preset", ["full_grid", "table2", "controls", "cifar10-lenet5", "demo"])
def test_no_preset_gives_impactx_more_candidates_than_what_it_is_compared_with(preset):
    found = roles(load_settings(preset))
    compared = {name: role.candidates for name, role in found.items() if role.kind in ("a", "no_maps", "shuffled")
                or name in ("abn", "wae")}
    assert {n for n in compared.values() if n} == {found["impactx"].candidates}, compared


def test_the_second_member_of_an_ensemble_has_a_seed_that_no_repeat_has():
    c = cifar("approach=[ensemble]", "repeats=5")
    found = [first_model(c, "ensemble", a_of(c, repeat)) for repeat in range(5)]
    seconds = {model.parameters()["second_seed"] for model in found}
    assert len(seconds) == 5 and not seconds & set(range(5))
    assert [model.split.seed for model in found] == [0, 1, 2, 3, 4]


def test_the_test_of_wae_depends_on_the_maps_of_the_test_images():
    c = cifar("approach=[wae]")
    model, store = first_model(c, "wae", a_of(c)), c.maps_of("wae", a_of(c))[1]
    test = c.test(model, trained("v"))
    assert test.recipe["maps"] == {"key": store.key} and test.maps.key == store.key
    assert test.inputs()["test_maps"] == store.folder
    assert store.part == "test" and store.target == "class_weighted" and store.recipe["target"] == "class_weighted"


def test_the_grid_is_the_product_in_a_fixed_order():
    found = cell("grid.batch_size=[16,32]").configurations()
    assert len(found) == 8 and [tuple(vars(c).values()) for c in found[:3]] == [
        (0.001, 16, 0.1), (0.001, 16, 0.2), (0.001, 32, 0.1)]
    assert {trial.split.common_fraction for trial in stage1(cell())} == {0.1}


def test_job_keys_name_the_experiment_not_its_execution():
    def of(*overrides):
        return job_key(load_settings("demo", overrides, CONFIGS))

    assert of() == of("output=/x", "cluster.threads=4", "tracking.enabled=false", "training.compile=always",
                      "training.memory_mb=100", "data_root=/d", "cache=/c", "cache_gb=5",
                      "datasets.digits.noticed_by=contents", "repeats=7", "evaluation.margin=1", "cluster.device=cpu",
                      "models.lenet5.resources.trial.gpus=1")
    assert len({of(), of("seed=1"), of("training.epochs=3"), of("approaches.impactx.lambdas=[0.2]"), of("name=x"),
                of("models.lenet5.input_size=40")}) == 6


def test_fingerprints_do_not_depend_on_the_order_of_keys_and_refuse_nan():
    assert fingerprint({"a": 1, "b": [0.1]}) == fingerprint({"b": [0.1], "a": 1}) != fingerprint({"a": 1, "b": [0.2]})
    assert len(fingerprint({})) == 32
    with pytest.raises(ValueError):
        fingerprint({"a": float("nan")})


TRIALS = stage1(cell("grid.learning_rate=[0.001,0.002,0.003,0.004]", "grid.batch_size=[16,32]",
                     "grid.validation_fraction=[0.2]"))


def result(accuracy: float, loss: float, **more) -> TrainingResult:
    return trained(best={"val_accuracy": accuracy, "common_accuracy": 1 - accuracy, "val_loss": loss} | more)


def test_selection_is_by_accuracy_then_loss_then_order():
    def chosen(*results, metric="val_accuracy"):
        found = {trial.folder: one for trial, one in zip(TRIALS, results, strict=False) if one is not None}
        return TRIALS.index(select(TRIALS[:4], Outcomes(found), metric).trial)

    assert chosen(result(0.5, 1), result(0.9, 9), result(0.8, 0)) == 1
    assert chosen(result(0.5, 1), result(0.9, 9), result(0.8, 0), metric="common_accuracy") == 0
    assert chosen(result(0.9, 2), result(0.9, 1), result(0.9, 3)) == 1
    assert chosen(result(0.9, 1), result(0.9, 1)) == 0
    assert chosen(None, trained(), result(0.1, 5)) == 2
    # A larger lambda makes the whole loss larger whatever the classifier is worth: the cross entropy decides.
    assert chosen(result(0.9, 1.0, val_ce=0.4, val_mse=3.0), result(0.9, 2.0, val_ce=0.3, val_mse=1.2)) == 1


def test_no_candidate_is_an_error_with_the_reasons():
    failures = {trial.folder: f"disk {number} is full" for number, trial in enumerate(TRIALS) if number}
    with pytest.raises(SelectionError) as caught:
        select(TRIALS, Outcomes({TRIALS[0].folder: trained()}, failures), "val_accuracy")
    text = str(caught.value)
    assert "none of 8 trials" in text and "7 failed and 1 diverged" in text
    assert f"{TRIALS[1].name}: disk 1 is full" in text and "and 3 more" in text


def test_results_are_found_again_and_damage_is_named(tmp_path):
    artifacts, step = Artifacts(Storage(tmp_path)), TRIALS[0]
    assert artifacts.result(step) is None
    artifacts.storage.write(f"{step.folder}/running.pt", b"state")
    artifacts.finish(step, kept := result(0.5, 1), {"checkpoint.pt": b"weights"})
    assert sorted(p.name for p in (tmp_path / step.folder).iterdir()) == ["checkpoint.pt", "result.json"]
    assert artifacts.result(step) == kept
    path = tmp_path / step.folder / "result.json"
    about = json.loads(path.read_text())
    assert (about["name"], about["recipe"], about["code"]) == (step.name, step.recipe, step.code)
    path.write_text(json.dumps(about)[:-1])
    with pytest.raises(StorageError, match=f"{path} is damaged"):
        artifacts.result(step)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(StorageError, match=f"{path} is not what this version writes"):
        artifacts.result(step)


# ---- how much of the grid

GRID = ("grid.learning_rate=[0.001,0.002,0.003,0.004]", "grid.batch_size=[16,32]", "grid.validation_fraction=[0.1,0.2]")


def names(*overrides):
    return [trial.name for trial in stage1(cell(*GRID, *overrides))]


def test_a_drawn_part_of_the_grid_is_the_same_each_time_and_another_for_another_seed():
    everything = names()
    drawn = names("grid.strategy=random", "grid.max_trials=5")
    assert len(drawn) == len(set(drawn)) == 5 and set(drawn) < set(everything)
    assert drawn == names("grid.strategy=random", "grid.max_trials=5") == names("grid.max_trials=5")
    assert drawn != names("grid.strategy=random", "grid.max_trials=5", "seed=1")
    assert drawn == names("grid.strategy=random", "grid.max_trials=9")[:5], "a larger part holds the smaller one"
    assert drawn != everything[:5], "the first of a grid are all alike"


@pytest.mark.parametrize("override", ["grid.strategy=asha", "grid.max_hours=1", "grid.max_trials=99"])
def test_a_strategy_changes_the_order_and_no_step(override):
    plain, other = stage1(cell(*GRID)), stage1(cell(*GRID, override))
    assert [u.key for u in plain] != [u.key for u in other]
    assert {u.key for u in plain} == {u.key for u in other} and len(plain) == 16


def test_what_stopped_a_trial_is_known_by_all_that_decides_it():
    def halving(*overrides):
        return stage1(cell(*GRID, "grid.strategy=asha", *overrides))[0].halving

    assert halving() == halving("grid.strategy=asha")
    for other in ("grid.grace_epochs=2", "grid.reduction=2", "grid.select_on=own", "training.epochs=30",
                  "grid.batch_size=[16]"):
        assert halving(other) != halving(), other
    assert stage1(cell(*GRID))[0].halving is None


def test_strategies_that_cannot_be_are_refused():
    with pytest.raises(ConfigurationError, match="'random' needs max_trials"):
        cell("grid.strategy=random")
    with pytest.raises(ConfigurationError, match="models.lenet5.resources.trial.workers to 1"):
        cell("grid.strategy=asha", "models.lenet5.resources.trial={workers: 2, gpus: 1}")
