"""The queue that shares a cluster between cells, as a plain object."""

from __future__ import annotations

import threading
import time

import pytest

from impactx.cluster.explainers import Pool
from impactx.cluster.pool import Workforce
from impactx.cluster.shares import Closed, Shares

ONE = {"CPU": 1}


def shares(**capacity: float) -> Shares:
    return Shares(lambda: capacity)


def taken(of: Shares, owner: str, need=ONE, key: str = "k") -> int:
    """How often the owner may take it one after the other."""
    count = 0
    while count < 100 and of.take(owner, key, need):
        count += 1
    of.forget(owner, key)
    return count


def test_one_owner_gets_everything():
    assert taken(shares(CPU=4), "a") == 4


def test_a_freed_part_goes_to_the_one_who_holds_least():
    of = shares(CPU=4)
    assert taken(of, "a") == 4
    assert not of.take("b", "k", ONE)
    assert not of.take("a", "k", ONE), "a waits as well"
    of.give("a", ONE)
    assert not of.take("a", "k", ONE), "b holds less"
    assert of.take("b", "k", ONE)
    of.give("a", ONE)
    assert not of.take("a", "k", ONE) or not of.take("b", "k", ONE)


def test_who_waits_for_nothing_leaves_it_to_others():
    of = shares(CPU=4)
    assert of.take("b", "k", ONE)
    assert taken(of, "a") == 3


def test_two_that_always_want_come_to_equal_parts():
    of, held = shares(CPU=8), {"a": 0, "b": 0}
    held["a"] = taken(of, "a")
    of.take("a", "k", ONE), of.take("b", "k", ONE)
    for _ in range(20):  # something of the richer one ends, both ask again
        richer = max(held, key=lambda owner: held[owner])
        of.give(richer, ONE)
        held[richer] -= 1
        for owner in ("a", "b"):
            held[owner] += of.take(owner, "k", ONE)
    assert sorted(held.values()) == [4, 4]


def test_a_large_need_is_not_starved_by_small_ones():
    of = shares(CPU=4)
    assert taken(of, "a") == 4
    assert not of.take("b", "k", {"CPU": 3})
    for freed in range(3):
        of.give("a", ONE)
        assert not of.take("a", "k", ONE), "kept for b"
        assert of.take("b", "k", {"CPU": 3}) == (freed == 2)


def test_who_waits_for_gpus_does_not_block_cpus():
    of = shares(CPU=4, GPU=1)
    assert of.take("a", "k", {"CPU": 1, "GPU": 1})
    assert not of.take("b", "k", {"CPU": 1, "GPU": 1})
    assert of.take("c", "k", {"CPU": 1}), "one CPU is kept for b, two are free"
    assert of.take("a", "k", {"CPU": 1})
    assert not of.take("c", "k", {"CPU": 1}), "the last one is b's"


def test_fractions_of_a_gpu_and_a_limit_of_trials_over_all_owners():
    of = shares(CPU=16, GPU=1)
    assert taken(of, "a", {"CPU": 1, "GPU": 0.25}) == 4
    of = shares(CPU=16, trials=3)
    assert taken(of, "a", ONE | {"trials": 1}) + taken(of, "b", ONE | {"trials": 1}) == 3


def test_more_than_there_is_is_given_only_to_who_is_alone():
    of = shares(CPU=2)
    assert of.take("a", "k", {"CPU": 8})
    assert not of.take("b", "k", ONE)


def test_giving_back_is_asked_for_only_where_it_evens_things_out():
    of = shares(CPU=4)
    assert taken(of, "a") == 4
    assert not of.should_give("a", ONE), "nobody waits"
    of.take("b", "k", ONE)
    assert of.should_give("a", ONE)
    of.give("a", ONE)
    of.take("b", "k", ONE)
    of.take("b", "k", ONE)
    assert of.should_give("a", ONE), "3 and 1"
    of.give("a", ONE)
    of.take("b", "k", ONE)
    of.take("b", "k", ONE)
    assert not of.should_give("a", ONE), "2 and 2"


def test_waiting_ends_with_what_is_given_back_and_with_the_job():
    of, got = shares(CPU=1), []
    assert of.take("a", "k", ONE)

    def wait(owner):
        try:
            of.wait(owner, "k", ONE)
            got.append(owner)
        except Closed:
            got.append(f"{owner} closed")

    threads = [threading.Thread(target=wait, args=(owner,)) for owner in "bc"]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert got == []
    of.give("a", ONE)
    threads[0].join(5)
    assert got == ["b"]
    of.close()
    threads[1].join(5)
    assert got == ["b", "c closed"]
    with pytest.raises(Closed):
        of.take("a", "k", ONE)


def test_close_waits_for_those_who_ask_again_and_again():
    of, left = Shares(lambda: {"CPU": 1}), []

    def ask():
        with of.asking():
            try:
                while True:
                    of.check()
                    time.sleep(0.3)
            except Closed:
                time.sleep(0.2)
                left.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    of.close()
    assert left == [True]
    with pytest.raises(Closed), of.asking():
        pass


# ---- groups of map makers, which come and go with a cell's share

class Groups:
    """Starts groups that do nothing."""

    def __init__(self) -> None:
        self.started: list[Pool] = []

    def __call__(self, group: Pool) -> str:
        self.started.append(group)
        return group.name


def force(of: Shares, actors: int) -> tuple[Workforce, Groups]:
    groups = Groups()
    return Workforce(Pool("cpu", "cpu", actors, {"num_cpus": 0.75}, ONE), of, "maps", groups), groups


def test_alone_all_actors_are_one_group():
    of = shares(CPU=8)
    makers, groups = force(of, 8)
    makers.grow()
    assert [g.actors for g in groups.started] == [8]
    makers.end()
    assert taken(of, "other") == 8


def test_beside_another_cell_maps_take_their_half_and_grow_into_what_is_free():
    of = shares(CPU=8)
    assert taken(of, "trials") == 8
    makers, groups = force(of, 8)
    makers.grow()
    assert groups.started == [], "nothing is free"
    for freed in range(4):
        assert of.should_give("trials", ONE)
        of.give("trials", ONE)
        assert not of.take("trials", "k", ONE), "the maps hold less"
        makers.grow()
        assert sum(g.actors for g in groups.started) == 2 * ((freed + 1) // 2), "in groups of a quarter"
    assert not of.should_give("trials", ONE), "half and half"
    of.forget("trials", "k")
    for _ in range(4):
        of.give("trials", ONE)
    makers.grow()
    assert [g.actors for g in groups.started] == [2, 2, 2, 2]


def test_maps_that_hold_everything_make_room_group_by_group():
    of = shares(CPU=8)
    assert of.take("trials", "k", ONE)
    makers, groups = force(of, 7)
    makers.grow()
    of.give("trials", ONE)
    makers.grow()
    assert [g.actors for g in groups.started] == [2, 2, 2, 1]
    assert makers.shrink() is None, "nobody waits"
    of.take("trials", "k", ONE)
    assert taken_or_waits(of)
    left = makers.shrink()
    assert left == groups.started[-1].name and makers.shrink() is None, "one group at a time"
    assert makers.ended(left) and of.take("trials", "k", ONE)


def taken_or_waits(of: Shares) -> bool:
    """The trials take what is free, and wait for more."""
    return taken_all(of) >= 0 and not of.take("trials", "k", ONE)


def taken_all(of: Shares) -> int:
    count = 0
    while of.take("trials", "k", ONE):
        count += 1
    return count
