"""What fits on a cluster, and what is said where it does not: without one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from impactx.cluster import capacity
from impactx.cluster.capacity import ClusterError, blocked, check, makers, processes
from impactx.configuration import load_settings
from impactx.settings import (
    ClusterSettings,
    ExplainSettings,
    MapsResources,
    ModelResources,
    ModelSettings,
)


def nodes(*sizes: tuple[float, float]) -> list[dict]:
    """Nodes with so many CPUs and GPUs, as Ray tells of them, and a large one that is dead."""
    alive = [{"Alive": True, "Resources": {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})}
             for cpus, gpus in sizes]
    return [*alive, {"Alive": False, "Resources": {"CPU": 999.0, "GPU": 99.0}}]


@pytest.mark.parametrize("gpus, on_two, each", [
    (0.4, 4, 1 / 2), (0.25, 8, 1 / 4), (0.3, 6, 1 / 3), (1 / 3, 6, 1 / 3), (0.6, 2, 1), (1, 2, 1), (0.1, 20, 0.1)])
def test_a_fraction_is_of_one_gpu(gpus, on_two, each):
    assert processes(1, gpus, {"CPU": 64, "GPU": 2}) == on_two and blocked(gpus) == pytest.approx(each)


def test_processes_need_cpus_and_whole_gpus():
    assert processes(0.1, 0, {"CPU": 0.3}) == 3 and blocked(0) == 0
    assert processes(2, 0.5, {"CPU": 5, "GPU": 4}) == 2 and processes(1, 0.5, {"CPU": 5}) == 0
    assert processes(0, 1, {"CPU": 0, "GPU": 3}) == 3


def model(trial=None, training=None, maps=None) -> ModelResources:
    """What a model asks for."""
    parts = {"trial": trial, "training": training, "maps": maps}
    return ModelResources.model_validate({name: part for name, part in parts.items() if part})


@pytest.mark.parametrize("settings, trial, trials, cells", [
    ({}, {"gpus": 0.4}, 4, 4), ({}, {"cpus": 3, "workers": 2, "gpus": 0}, 2, 3), ({}, {"gpus": 0}, 16, 16),
    ({"max_concurrent_trials": 5}, {"gpus": 0}, 16, 5), ({"max_concurrent_trials": 1}, {"gpus": 0}, 16, 3),
    ({"cells_at_once": 1}, {"gpus": 0}, 16, 1), ({"cells_at_once": 9, "max_concurrent_trials": 5}, {"gpus": 0}, 16, 9)])
def test_cells_at_once_are_as_many_as_trials_at_once(settings, trial, trials, cells):
    have, one = {"CPU": 16, "GPU": 2}, model(trial)
    assert capacity.trainings_at_once(one.trial, have) == trials
    assert capacity.cells_at_once(ClusterSettings(**settings), [one], have) == cells


def test_of_several_models_the_one_counts_of_which_most_trials_fit():
    models = [model({"gpus": 1}), model({"gpus": 0.25}), model({"gpus": 0.5})]
    assert capacity.cells_at_once(ClusterSettings(), models, {"CPU": 16, "GPU": 2}) == 8


def test_trainings_at_once():
    have = {"CPU": 16, "GPU": 3}
    assert capacity.trainings_at_once(model({"workers": 2}).trial, have) == 1
    assert capacity.trainings_at_once(model({"workers": 2, "cpus": 3, "gpus": 0}).trial, have) == 2
    assert capacity.trainings_at_once(model().trial, {"CPU": 1}) == 1


@pytest.mark.parametrize("settings, have, used", [
    ({}, {"CPU": 8, "GPU": 1}, True), ({}, {"CPU": 8}, False), ({"grows_to_gpus": 2}, {"CPU": 8}, True),
    ({"device": "cpu"}, {"CPU": 8, "GPU": 1}, False), ({"device": "cpu", "grows_to_gpus": 2}, {"CPU": 8}, False),
    ({"device": "logical"}, {"CPU": 8, "GPU": 1}, True)])
def test_gpus_are_used_where_there_are_some(settings, have, used):
    assert capacity.uses_gpus(ClusterSettings(**settings), have) is used


@pytest.mark.parametrize("part, sizes, said", [
    ({"trial": {"cpus": 3}}, [(2, 0), (2, 0)],
     r"m.trial: cpus = 3 and gpus = 0 on one node: there is room for 0 \(the largest of 2 nodes has 2 CPUs and 0 GPUs"),
    ({"trial": {"workers": 3, "cpus": 3}}, [(5, 0), (5, 0)], "m.trial: workers = 3, each with .*room for 2"),
    ({}, [(8, 0), (0, 4)], "m.trial: cpus = 1 and gpus = 1 .*room for 0 .*largest of 2 nodes has 0 CPUs and 4 GPUs"),
    ({"trial": {"workers": 5, "gpus": 0.6}}, [(16, 2)], "m.trial: workers = 5, each with .*room for 2"),
    ({"training": {"workers": 3}}, [(8, 2)], "m.training: workers = 3, each with cpus = 1 and gpus = 1 .*room for 2"),
    ({"maps": {"cpus": 5}}, [(8, 0), (4, 1)], "m.maps: cpus = 5 and gpus = 1"),
    ({"maps": {"gpus": 0.5}}, [(8, 0.5)], "m.maps: .*gpus = 0.5 on one node: there is room for 0"),
    ({"trial": {"cpus": 9, "gpus": 0}, "grows_to_cpus": 10}, [(2, 0)], "room for 0 .*all of them may come to 10 and 0"),
])
def test_what_fits_on_no_node_is_refused(part, sizes, said):
    settings = {name: part.pop(name) for name in list(part) if name.startswith("grows")}
    with pytest.raises(ClusterError, match=said) as raised:
        check(ClusterSettings(**settings), nodes(*sizes), wanted(model(**part)))
    assert "Ask for less" in str(raised.value)
    assert ("cluster.device=cpu" in str(raised.value)) is any(gpus for _, gpus in sizes)


def wanted(one: ModelResources, name: str = "m") -> dict:
    """What a job with one model asks for, by setting."""
    return {f"{name}.{kind}": getattr(one, kind) for kind in ("trial", "training", "maps")}


@pytest.mark.parametrize("settings, part, sizes", [
    ({}, {}, [(1, 0)]), ({}, {"trial": {"workers": 4}}, [(2, 0), (2, 0)]),
    ({}, {"trial": {"workers": 2}}, [(1, 1), (1, 1)]), ({"device": "cpu"}, {}, [(8, 0), (0, 4)]),
    ({"grows_to_cpus": 10}, {"trial": {"cpus": 8}}, [(2, 0)]), ({}, {"maps": {"workers": 9}}, [(2, 0)]),
    ({"grows_to_gpus": 4, "grows_to_cpus": 32}, {"trial": {"workers": 4}}, [(8, 1)]),
    ({"grows_to_gpus": 8, "grows_to_cpus": 8}, {}, [(0, 0)]),
])
def test_what_fits_or_waits_for_growth_is_not_refused(settings, part, sizes):
    check(ClusterSettings(**settings), nodes(*sizes), wanted(model(**part)))


def test_the_papers_models_fit_together_on_one_cluster_without_a_setting():
    """Each has its share of a GPU, so the bare command runs all nine cells."""
    settings = load_settings("full_grid", [], Path(__file__).resolve().parents[2] / "configs")
    check(settings.cluster, nodes((8, 1), (8, 1)), settings.processes())
    have = {"CPU": 16, "GPU": 2}
    fits = {name: (capacity.trainings_at_once(one.resources.trial, have),
                   capacity.trainings_at_once(one.resources.training, have), makers(one.resources, have))
            for name, one in settings.models.items()}
    # While maps are made on both GPUs, the CPUs of eight trials of LeNet-5 stay free.
    assert fits == {"lenet5": (8, 8, (2, 8)), "mobilenet": (4, 4, (2, 12)), "efficientnet_b2": (2, 2, (2, 14))}


def test_who_makes_maps():
    have = {"CPU": 4, "GPU": 2}
    assert makers(model(), have) == (2, 2)
    assert makers(model().on_cpus(), have) == (4, 0) and makers(model(maps={"gpus": 0}), have) == (4, 0)
    assert makers(model(maps={"workers": 1}), have) == (1, 0), "a number is a number"
    assert makers(model(maps={"gpus": 0.5}), have) == (4, 0) and makers(model({"cpus": 9, "gpus": 0}), have) == (2, 2)
    assert makers(model(), {"CPU": 1, "GPU": 2}) == (1, 0)


@pytest.mark.parametrize("part, said", [
    ({"trial": {"gpus": 1.5}}, "1.5 of a GPU fits no card: allowed are 0 .* and 0.01 to 1.*by workers"),
    ({"maps": {"gpus": 0.00001}}, "1e-05 of a GPU fits no card"), ({"maps": {"gpus": -1}}, "-1 of a GPU fits no card"),
    ({"training": {"gpus": 0.5, "workers": 2}}, "workers = 2 with gpus = 0.5: .*set gpus to 1, or workers to 1"),
    ({"trial": {"cpus": 0}}, "greater than 0"), ({"maps": {"workers": 0}}, "greater than or equal to 1")])
def test_resources_that_no_machine_has_are_refused(part, said):
    with pytest.raises(ValueError, match=said):
        model(**part)


# ---- who asks for it


@pytest.fixture
def ray(monkeypatch):
    """Ray that tells of one node of 2 CPUs and 2 GPUs."""
    library = pytest.importorskip("ray")
    monkeypatch.setattr(library, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    monkeypatch.setattr(library, "nodes", lambda: [
        {"NodeID": "n", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 2.0}}])
    return library


def test_measurements_count_a_fraction_as_what_it_blocks(ray):
    from impactx.cluster.measuring import slots_of

    slots = slots_of(ClusterSettings(), model({"cpus": 0.1, "gpus": 0.4}, {"cpus": 0.5}))
    assert {name: where[0].on_node for name, where in slots.items()} == {
        "trial": 4, "model": 2, "maps on GPUs": 2, "judging": 4}
    slots = slots_of(ClusterSettings(), model({"cpus": 0.1, "gpus": 0.4}, {"cpus": 0.5}, {"cpus": 0.25}))
    assert slots["maps on CPUs"][0].on_node == 4, "one CPU of two is kept for trainings on both GPUs"


def test_maps_are_asked_for_on_nodes_that_are_not_there_yet(ray):
    from impactx.cluster.executor import RayExecutor
    from impactx.cluster.maps import Pool, pools_of

    def asked(**settings):
        executor = RayExecutor(ClusterSettings(**settings), None, None, {"m": model()})
        return pools_of(executor.resources["m"], executor._capacity())

    assert asked() == (Pool(2, 1, 1), None), "two processes on GPUs need both CPUs"
    assert asked(grows_to_gpus=8, grows_to_cpus=64) == (Pool(8, 1, 1), Pool(56, 1, 0, backwards=True))
    assert asked(grows_to_gpus=8, grows_to_cpus=64, device="cpu") == (Pool(64, 1, 0), None)


def test_actors_on_cpus_join_at_one_store_at_a_time(ray, monkeypatch):
    """Each store leaves CPUs to processes on GPUs; those of two stores together would not."""
    from impactx.cluster import executor as module

    executor, joined = module.RayExecutor(ClusterSettings(grows_to_cpus=64), None, None, {"m": model()}), []
    step = SimpleNamespace(model_name="m")

    def explain(step, place, device, pool, joining, **how):
        joined.append(joining is not None)
        if len(joined) == 1:
            executor._explain(step, None)

    monkeypatch.setattr(module, "explain_on_pools", explain)
    executor._explain(step, None)
    executor._explain(step, None)
    assert joined == [True, False, True]


def test_a_plan_says_where_nothing_can_be_measured_yet(ray):
    from impactx.cluster.measuring import slots_of

    may_grow = ClusterSettings(grows_to_cpus=10, grows_to_gpus=9)
    with pytest.raises(ClusterError, match="room for trial, judging: .*grows_to_cpus = 10 and grows_to_gpus = 9"):
        slots_of(may_grow, model({"cpus": 8}))
    with pytest.raises(ClusterError, match="room for model: "):
        slots_of(may_grow, model(training={"cpus": 8}))
    with pytest.raises(ClusterError, match="room for maps: "):
        slots_of(may_grow, model(maps={"cpus": 8}))


def test_a_plan_has_as_many_cells_at_once_as_the_job(ray, monkeypatch):
    from impactx.cluster import measuring

    monkeypatch.setattr(measuring, "measure", lambda *anything: None)
    monkeypatch.setattr(measuring, "price_cell", lambda *anything: None)
    monkeypatch.setattr(measuring, "probes_of", lambda cells: [])
    monkeypatch.setattr(measuring, "price_list", lambda prices, measured, cells_at_once: cells_at_once)
    cell = SimpleNamespace(model=ModelSettings(name="m", architecture="lenet5"))
    found = [measuring.plan([cell], ClusterSettings(**settings), SimpleNamespace(artifacts=None))
             for settings in ({}, {"cells_at_once": 1}, {"grows_to_cpus": 9, "grows_to_gpus": 9},
                              {"grows_to_cpus": 9, "device": "cpu"}, {"max_concurrent_trials": 1})]
    assert found == [3, 1, 9, 9, 3]


def test_it_is_checked_as_soon_as_a_job_connects(ray, monkeypatch, caplog):
    from impactx.cluster import connection
    from impactx.cluster.connection import connected, executor_when_needed

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(ray, "init", lambda **options: None)
    left, asked = [], []
    monkeypatch.setattr(ray, "shutdown", lambda: left.append(True))
    monkeypatch.setattr(connection, "check_gpus", lambda nodes: asked.append(len(nodes)))
    # Two CPUs on one node; "the cluster is too small" for what is on none, though there may be enough in all.
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0, "GPU": 2.0})
    with pytest.raises(ClusterError, match="m.trial: cpus = 3"), connected(
            ClusterSettings(), wanted(model({"cpus": 3}))):
        pass
    assert left and not asked
    settings = ExplainSettings(datasets={"digits": {"name": "digits", "source": "digits"}})
    with caplog.at_level(logging.INFO, "impactx"), executor_when_needed(settings, None, "net") as executor:
        assert executor().resources["net"].maps == MapsResources()
    assert asked == [1] and "on GPUs" in caplog.text
    for off in ({"cluster": {"device": "cpu"}}, {"resources": {"gpus": 0}}):
        caplog.clear()
        settings = ExplainSettings(datasets={"digits": {"name": "digits", "source": "digits"}}, **off)
        with caplog.at_level(logging.INFO, "impactx"), executor_when_needed(settings, None, "net") as executor:
            assert executor().resources["net"].maps.gpus == 0
        assert asked == [1] and "on CPUs" in caplog.text
