"""Ray Data's actor pools make the same maps as one process, whatever dies or stands still on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
from lab import Lab, descendants, fill, ignore, kill, small_disk, task, until

from impactx.cluster import maps as cluster_maps
from impactx.cluster.maps import Pool, explain_on_pools
from impactx.experiment.artifacts import CHECKPOINT
from impactx.experiment.steps.base import StepError
from impactx.experiment.steps.maps import ShardReport
from impactx.explain.maps.store import StoreError
from impactx.storage import StorageError

pytestmark = pytest.mark.usefixtures("cluster")
ACTORS = "MapWorker"
TWO = Pool(2, 0.7)
# What a cluster of CPU and GPU machines gets; the first holds the GPU that only the scheduler knows.
MIXED = Pool(1, 0, 1), Pool(1, 0.7, backwards=True)


def explain(maps, place, *pools):
    """Make the maps by these pools: the one that begins, and the one on CPUs that may join."""
    explain_on_pools(maps, place, "logical", *pools, on_maps=ignore, left=lambda: False)


@pytest.fixture(scope="module")
def explained(tmp_path_factory, cache):
    """A lab whose A is trained and explained in this process; shards take long enough to be met under way."""
    one = Lab(tmp_path_factory.mktemp("one") / "output", cache,
              attribution={"method": "partition", "max_evals": 400, "batch_size": 10}, maps={"shard_size": 10})
    a = one.a()
    one.local.train(task(a), ignore)
    one.local.explain(task(one.maps(a)), ignore)
    return one, a, one.maps(a)


@pytest.fixture
def fresh(explained, lab):
    """The same A in another folder, nothing explained yet; with the maps' step and its store."""
    one, a, maps = explained
    two = lab(attribution=one.settings.attribution.model_dump(), maps=one.settings.maps.model_dump())
    copy(one, two, a.folder, one.place.artifacts.storage.names(a.folder))
    return two, maps, maps.open_store(two.place)


def copy(one, two, folder, names):
    for name in names:
        two.place.artifacts.storage.write(f"{folder}/{name}", one.place.artifacts.storage.read(f"{folder}/{name}"))


def files(lab, folder):
    """The shards of a store: name -> bytes."""
    storage = lab.place.artifacts.storage
    return {name: storage.read(f"{folder}/{name}") for name in storage.names(folder) if name.endswith(".parquet")}


def same_maps(one, two, maps):
    """Each shard is there once, sound, and the same to the bit."""
    store = maps.open_store(two.place)
    assert store.verify() == []
    here, there = files(one, maps.folder), files(two, maps.folder)
    assert len(there) == store.spec.shards == 11
    assert there == here
    rows = [i for k in range(store.spec.shards) for i in store.read_shard(k)["index"].to_pylist()]
    assert rows == list(range(101))


def begun(store):
    """Wait until some shards are there, and others are not."""
    until(lambda: len(store.missing()) < store.spec.shards, "the first shard")
    assert store.missing(), "all shards were there before anything could happen"


def in_background(work):
    """Start something that acts while the pool is at work; join() raises what it raised."""
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()

    def join():
        thread.join()
        if errors:
            raise errors[0]

    return join


def test_the_pool_makes_the_same_maps_and_only_those_that_are_missing(explained, fresh):
    one, two, maps, store = explained[0], *fresh
    copy(one, two, maps.folder, [store.shard_name(4)])
    path = two.place.artifacts.storage.uri(f"{maps.folder}/{store.shard_name(4)}")
    before, seen = os.stat(path).st_mtime_ns, []
    two.ray().explain(task(maps), lambda *numbers: seen.append(numbers))
    same_maps(one, two, maps)
    assert os.stat(path).st_mtime_ns == before
    assert seen[-1] == (91, 10, 101)
    assert two.place.artifacts.result(maps).images == 101


def test_a_killed_actor_loses_nothing(explained, fresh):
    one, two, maps, store = explained[0], *fresh
    killed = []

    def act():
        begun(store)
        killed.extend(kill(ACTORS))

    join = in_background(act)
    explain(maps, two.place, TWO)
    join()
    assert killed
    same_maps(one, two, maps)


@pytest.mark.timeout(300)
def test_two_pools_at_once_and_a_worker_that_stands_still_does_not_hold_up_the_end(explained, fresh):
    one, two, maps, store = explained[0], *fresh
    stopped = []

    def act():
        begun(store)
        stopped.extend([pid for pid, line in descendants(os.getpid()).items() if line.startswith(f"ray::{ACTORS}")][:1])
        os.kill(stopped[0], signal.SIGSTOP)

    join = in_background(act)
    explain(maps, two.place, *MIXED)
    join()
    assert stopped
    same_maps(one, two, maps)
    until(lambda: not any(line.startswith(f"ray::{ACTORS}") for line in descendants(os.getpid()).values()),
          "the end of the actor that stood still")


def test_actors_that_wait_for_nodes_hold_up_nobody(explained, fresh):
    """A cluster that may grow, and does not: those that there is room for make all maps, then the others are ended."""
    one, two, maps, _ = explained[0], *fresh
    two.ray(grows_to_cpus=6).explain(task(maps), ignore)
    same_maps(one, two, maps)


@pytest.mark.timeout(300)
def test_actors_on_cpus_join_where_gpus_are_slower_and_make_the_rest(explained, fresh):
    """Nobody has five GPUs: the pool on GPUs waits, as where trials hold them all."""
    one, two, maps, _ = explained[0], *fresh
    explain(maps, two.place, Pool(1, 0, 5), Pool(2, 0.7, backwards=True))
    same_maps(one, two, maps)


@pytest.mark.parametrize("by_gpus, joined", [(4, True), (5, False)])
def test_actors_on_cpus_join_only_if_each_can_make_one_more_shard(fresh, monkeypatch, by_gpus, joined):
    """While one on a CPU made one of eleven shards, those on GPUs made so many."""
    two, maps, _ = fresh
    started = []

    class Streams(cluster_maps._Pools):
        def start(self, pool, shards):
            started.append((pool.actors, list(shards)))
            made = shards[:by_gpus] if pool.num_gpus else shards
            self.reports |= {shard: ShardReport(shard, 10, 1.0) for shard in made}
            self._threads = [threading.current_thread()] if len(started) < 3 else []
            return made

    monkeypatch.setattr(cluster_maps, "_Pools", Streams)
    ends = iter([False, True])
    with pytest.raises(StepError, match="the pools ended") if not joined else contextlib.nullcontext():
        explain_on_pools(maps, two.place, "logical", Pool(1, 1, 1), Pool(2, 1, backwards=True), on_maps=ignore,
                         left=lambda: next(ends))
    assert started == [(1, list(range(11))), (1, [9])] + [(2, [4, 5, 6, 7, 8, 10])] * joined


def of_node(node, name=ACTORS):
    """The map workers, or other processes of Ray, on one node of the cluster."""
    raylet = node.all_processes["raylet"][0].process.pid
    return [pid for pid, line in descendants(raylet).items() if line.startswith(f"ray::{name}")]


@pytest.mark.timeout(300)
def test_a_lost_machine_loses_nothing(cluster, explained, fresh):
    """kill -9 of all processes of a node, in the middle of its shards."""
    one, two, maps, store = explained[0], *fresh
    second = cluster.add_node(num_cpus=1, object_store_memory=128 * 2**20)
    cluster.wait_for_nodes()
    lost = []

    def act():
        far = until(lambda: of_node(second), "a map worker on the second node")
        begun(store)
        until(lambda: len(store.missing()) <= store.spec.shards - 2, "two shards")
        cluster.remove_node(second, allow_graceful=False)
        lost.extend(far)

    join = in_background(act)
    explain(maps, two.place, Pool(3, 0.9))
    join()
    assert lost
    same_maps(one, two, maps)


def test_an_error_in_an_actor_arrives_as_itself(fresh):
    two, maps, store = fresh
    where = f"{two.a().folder}/{CHECKPOINT}"
    two.place.artifacts.storage.write(where, two.place.artifacts.storage.read(where)[:1000])
    with pytest.raises(StepError, match="checkpoint.*cannot be used"):
        explain(maps, two.place, TWO)
    assert len(store.missing()) == store.spec.shards


def test_a_disk_that_is_full_in_the_middle_of_the_shards(explained, lab, tmp_path):
    one, a, maps = explained
    with small_disk(tmp_path / "disk", 64) as disk:
        two = lab("disk/output", attribution=one.settings.attribution.model_dump(),
                  maps=one.settings.maps.model_dump())
        copy(one, two, a.folder, one.place.artifacts.storage.names(a.folder))
        store = maps.open_store(two.place)
        filler = fill(disk)
        with open(filler, "r+b") as stream:  # four shards of eleven have room, and some of a fifth
            stream.truncate(filler.stat().st_size - int(4.5 * len(files(one, maps.folder)[store.shard_name(0)])))
        with pytest.raises(StorageError, match="could not write .*shard-.*no space is left"):
            explain(maps, two.place, TWO)
        there = files(two, maps.folder)
        assert 1 <= len(there) <= 5
        assert there.items() <= files(one, maps.folder).items(), "a shard that is there is whole"
        assert not [path for path in disk.rglob("*") if path.name.startswith(".partial-")]
        filler.unlink()
        explain(maps, two.place, TWO)
        same_maps(one, two, maps)


def test_a_corrupt_shard_is_named_before_stage_2_reads_it(explained, fresh):
    one, two, maps, store = explained[0], *fresh
    copy(one, two, maps.folder, files(one, maps.folder))
    path = f"{maps.folder}/{store.shard_name(7)}"
    whole = two.place.artifacts.storage.read(path)
    middle = len(whole) // 2
    two.place.artifacts.storage.write(path, whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    assert [store.shard_name(7) in problem for problem in store.verify()] == [True]
    # Nothing else with these maps may stand in for it: the unpacked array is made in a cache of its own.
    place = type(two.place)(two.place.output, two.place.data_root, two.place.output + "/cache")
    with pytest.raises(StoreError, match=store.shard_name(7)):
        maps.finish(place, 1.0, 0, 0.0)
    assert two.place.artifacts.result(maps) is None
