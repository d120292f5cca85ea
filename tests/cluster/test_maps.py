"""Ray Data's actor pools make the same maps as one process, whatever dies or stands still on the way."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from lab import Lab, descendants, fill, ignore, kill, small_disk, task, until

from impactx.cluster.maps import Pool, explain_on_pools
from impactx.experiment.artifacts import CHECKPOINT
from impactx.experiment.steps.base import StepError
from impactx.explain.maps.store import StoreError
from impactx.storage import StorageError

pytestmark = pytest.mark.usefixtures("cluster")
ACTORS = "MapWorker"
TWO = [Pool("cpu", 2, 0.7, 0, backwards=False)]
# What a cluster of CPU and GPU machines gets; the second pool holds the GPU that only the scheduler knows.
MIXED = [Pool("cpu", 1, 0.7, 0, backwards=True), Pool("cpu", 1, 0, 1, backwards=False)]


def stays():
    """The job stays on its cluster."""
    return False


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
    two.ray(explain_cpu_actors=2, explain_gpu_actors=0).explain(task(maps), lambda *numbers: seen.append(numbers))
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
    explain_on_pools(maps, two.place, TWO, ignore, stays)
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
    explain_on_pools(maps, two.place, MIXED, ignore, stays)
    join()
    assert stopped
    same_maps(one, two, maps)
    until(lambda: not any(line.startswith(f"ray::{ACTORS}") for line in descendants(os.getpid()).values()),
          "the end of the actor that stood still")


def test_actors_that_wait_for_nodes_hold_up_nobody(explained, fresh):
    """A cluster that may grow, and does not: those that there is room for make all maps, then the others are ended."""
    one, two, maps, _ = explained[0], *fresh
    two.ray(explain_gpu_actors=0, grows_to_cpus=6).explain(task(maps), ignore)
    same_maps(one, two, maps)


@pytest.mark.timeout(300)
def test_an_actor_on_a_gpu_begins_where_others_wait_for_cpus(explained, fresh):
    one, two, maps, store = explained[0], *fresh
    many = Pool("cpu", 6, 1, 0, backwards=True)  # they fill the node, and four wait

    def act():
        until(lambda: len([line for line in descendants(os.getpid()).values() if line.startswith(f"ray::{ACTORS}")]) > 2
              or not store.missing(), "three actors on two CPUs and a GPU")
        assert store.missing()

    join = in_background(act)
    explain_on_pools(maps, two.place, [many, MIXED[1]], ignore, stays)
    join()
    same_maps(one, two, maps)


def of_node(node):
    """The map workers of one node of the cluster."""
    raylet = node.all_processes["raylet"][0].process.pid
    return [pid for pid, line in descendants(raylet).items() if line.startswith(f"ray::{ACTORS}")]


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
    explain_on_pools(maps, two.place, [Pool("cpu", 3, 0.9, 0, backwards=False)], ignore, stays)
    join()
    assert lost
    same_maps(one, two, maps)


def test_an_error_in_an_actor_arrives_as_itself(fresh):
    two, maps, store = fresh
    where = f"{two.a().folder}/{CHECKPOINT}"
    two.place.artifacts.storage.write(where, two.place.artifacts.storage.read(where)[:1000])
    with pytest.raises(StepError, match="checkpoint.*cannot be used"):
        explain_on_pools(maps, two.place, TWO, ignore, stays)
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
            explain_on_pools(maps, two.place, TWO, ignore, stays)
        there = files(two, maps.folder)
        assert 1 <= len(there) <= 5
        assert there.items() <= files(one, maps.folder).items(), "a shard that is there is whole"
        assert not [path for path in disk.rglob("*") if path.name.startswith(".partial-")]
        filler.unlink()
        explain_on_pools(maps, two.place, TWO, ignore, stays)
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
