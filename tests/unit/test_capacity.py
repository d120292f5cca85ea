"""What fits on a cluster, and what is said where it does not: without one."""

from __future__ import annotations

import logging
import os

import pytest

from impactx.cluster import capacity
from impactx.cluster.capacity import ClusterError, blocked, check, makers, processes
from impactx.settings import ClusterSettings


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


@pytest.mark.parametrize("settings, trials, cells", [
    ({"trial_gpus": 0.4}, 4, 4), ({"trial_gpus": 0.4, "trial_workers": 3}, 1, 3),
    ({"max_concurrent_trials": 5}, 5, 5), ({"max_concurrent_trials": 1}, 1, 3), ({}, 16, 16),
    ({"cells_at_once": 1, "max_concurrent_trials": 5}, 5, 1), ({"cells_at_once": 9, "max_concurrent_trials": 5}, 5, 9)])
def test_cells_at_once_are_as_many_as_trials_at_once(settings, trials, cells):
    have, s = {"CPU": 16, "GPU": 2}, ClusterSettings(**settings)
    assert capacity.trials_at_once(s, have) == trials and capacity.cells_at_once(s, have) == cells


def test_final_trainings_at_once():
    have = {"CPU": 16, "GPU": 3}
    assert capacity.trainings_at_once(ClusterSettings(train_workers=2, use_gpu=True), have) == 1
    assert capacity.trainings_at_once(ClusterSettings(train_workers=2, train_cpus=3), have) == 2
    assert capacity.trainings_at_once(ClusterSettings(use_gpu=True), {"CPU": 1}) == 1


@pytest.mark.parametrize("settings, sizes, said", [
    ({"trial_cpus": 3}, [(2, 0), (2, 0)],
     r"trial_workers = 1 with trial_cpus = 3 and trial_gpus = 0 on one node: there is room for 0 \(the largest of 2 "
     "nodes has 2 CPUs and 0 GPUs"),
    ({"trial_workers": 3, "trial_cpus": 3}, [(5, 0), (5, 0)], "trial_workers = 3, each with .*room for 2"),
    ({"trial_gpus": 1}, [(8, 0), (0, 4)], "trial_workers = 1 .*room for 0 .*largest of 2 nodes has 0 CPUs and 4 GPUs"),
    ({"trial_workers": 5, "trial_gpus": 0.4}, [(16, 2)], "trial_workers = 5, each .*room for 4"),
    ({"train_workers": 3, "use_gpu": True}, [(8, 2)], r"train_workers = 3, each with .*1 GPUs \(use_gpu\).*room for 2"),
    ({"trial_cpus": 8, "use_gpu": True}, [(8, 0), (4, 1)], "a test of a model with trial_cpus = 8 and 1 GPUs"),
    ({"explain_gpu_actors": 3}, [(4, 2)], "explain_gpu_actors = 3, each with one GPU on one node: there is room for 2"),
    ({"trial_cpus": 9, "grows_to_cpus": 10}, [(2, 0)], "room for 0 .*all of them may come to 10 and 0"),
    ({"trial_gpus": 1, "grows_to_cpus": 64}, [(8, 0)], "trial_gpus = 1.*grows_to_gpus"),
])
def test_what_fits_on_no_node_is_refused(settings, sizes, said):
    with pytest.raises(ClusterError, match=said) as raised:
        check(ClusterSettings(**settings), nodes(*sizes))
    assert "Ask for less" in str(raised.value)


@pytest.mark.parametrize("settings, sizes", [
    ({}, [(1, 0)]), ({"trial_workers": 4}, [(2, 0), (2, 0)]), ({"trial_workers": 2, "trial_gpus": 1}, [(1, 1), (1, 1)]),
    ({"trial_cpus": 8, "grows_to_cpus": 10}, [(2, 0)]),
    ({"trial_workers": 4, "trial_gpus": 1, "grows_to_gpus": 4, "grows_to_cpus": 32}, [(8, 1)]),
    ({"explain_gpu_actors": 8, "grows_to_gpus": 8}, [(8, 1)]),
    ({"explain_cpu_actors": 0, "grows_to_gpus": 8}, [(8, 0)]),
])
def test_what_fits_or_waits_for_growth_is_not_refused(settings, sizes):
    check(ClusterSettings(**settings), nodes(*sizes))


def test_trainings_are_nothing_to_a_job_of_maps(caplog):
    check(ClusterSettings(trial_cpus=64), nodes((2, 1)), trains=False)
    assert not caplog.messages


@pytest.mark.parametrize("settings, said", [
    ({"explain_cpu_actors": 0}, "explain_cpu_actors is 0; cluster.explain_gpu_actors is unset, which is one a GPU, and "
                                "the cluster has none. Set one"),
    ({"explain_cpu_actors": 0, "explain_gpu_actors": 0}, "explain_cpu_actors is 0; cluster.explain_gpu_actors is 0. S"),
])
def test_a_cluster_on_which_nobody_would_make_maps_is_refused_at_once(settings, said):
    with pytest.raises(ClusterError, match=said):
        check(ClusterSettings(**settings), nodes((4, 0)))


def test_who_makes_maps():
    assert makers(ClusterSettings(), {"CPU": 4, "GPU": 2}) == (4, 2)
    assert makers(ClusterSettings(explain_cpu_actors=0), {"CPU": 4, "GPU": 2}) == (0, 2)
    assert makers(ClusterSettings(explain_gpu_actors=0, explain_cpu_actors=9), {"CPU": 4, "GPU": 2}) == (9, 0)


@pytest.mark.parametrize("settings, warned", [
    ({}, True), ({"trial_gpus": 0.25}, False), ({"use_gpu": True}, False)])
def test_gpus_that_nothing_uses_are_warned_of(caplog, settings, warned):
    with caplog.at_level(logging.WARNING, "impactx"):
        check(ClusterSettings(**settings), nodes((8, 1), (8, 1)))
        check(ClusterSettings(), nodes((8, 0)))
    said = [line for line in caplog.messages if "has 2 GPUs" in line and "cluster.trial_gpus=1" in line
            and "cluster.use_gpu=true" in line]
    assert len(caplog.messages) == len(said) == warned


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

    slots = slots_of(ClusterSettings(trial_cpus=0.1, trial_gpus=0.4))
    assert {name: where[0].on_node for name, where in slots.items()} == {
        "trial": 4, "model": 2, "maps on CPUs": 2, "maps on GPUs": 2, "judging": 4}


def test_maps_are_asked_for_on_nodes_that_are_not_there_yet(ray):
    from impactx.cluster.executor import RayExecutor
    from impactx.cluster.maps import pools_of

    def asked(**settings):
        executor = RayExecutor(ClusterSettings(**settings), None, None)
        return {pool.device: (pool.actors, pool.num_cpus, pool.num_gpus)
                for pool in pools_of(executor.settings, executor._capacity())}

    # An actor on a GPU asks for no CPU: those on CPUs, which wait for more of them, would leave it none.
    assert asked() == {"cpu": (2, 1, 0), "cuda": (2, 0, 1)}
    assert asked(grows_to_gpus=8, grows_to_cpus=64) == {"cpu": (64, 1, 0), "cuda": (8, 0, 1)}


def test_a_plan_says_where_nothing_can_be_measured_yet(ray):
    from impactx.cluster.measuring import slots_of

    may_grow = {"grows_to_cpus": 10, "grows_to_gpus": 9}
    with pytest.raises(ClusterError, match="room for trial, judging: .*grows_to_cpus = 10 and grows_to_gpus = 9"):
        slots_of(ClusterSettings(trial_cpus=8, **may_grow))
    with pytest.raises(ClusterError, match="room for model: "):
        slots_of(ClusterSettings(train_cpus=8, **may_grow))


def test_a_plan_has_as_many_cells_at_once_as_the_job(ray, monkeypatch):
    from impactx.cluster import measuring

    monkeypatch.setattr(measuring, "measure", lambda *anything: None)
    monkeypatch.setattr(measuring, "price_list", lambda prices, measured, cells_at_once: cells_at_once)
    found = [measuring.plan([], ClusterSettings(**settings), None)
             for settings in ({}, {"cells_at_once": 1}, {"grows_to_cpus": 9}, {"max_concurrent_trials": 1})]
    assert found == [3, 1, 9, 3]


def test_it_is_checked_as_soon_as_a_job_connects(ray, monkeypatch, caplog):
    from impactx.cluster.connection import connected, executor_when_needed

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(ray, "init", lambda **options: None)
    left = []
    monkeypatch.setattr(ray, "shutdown", lambda: left.append(True))
    # Two CPUs on one node; "the cluster is too small" for what is on none, though there may be enough in all.
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0, "GPU": 2.0})
    with pytest.raises(ClusterError, match="trial_cpus = 3"), connected(ClusterSettings(trial_cpus=3)):
        pass
    assert left
    with connected(ClusterSettings()), executor_when_needed(ClusterSettings(trial_cpus=3), None) as executor:
        assert "all trainings are on CPUs" in caplog.text
        caplog.clear()
        executor()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], "an explain job trains nothing"
