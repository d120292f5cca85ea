"""The queue that shares shards between actors, as a plain object."""

from __future__ import annotations

import pytest

from impactx.cluster.shard_queue import WAIT, ShardQueue
from impactx.experiment.units import WorkError


class Clock:
    """Time as the test wants it."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_shards_are_handed_out_in_order_each_once(clock):
    queue = ShardQueue([3, 5, 8], 1, clock)
    assert [queue.take(f"t{k}") for k in range(3)] == [3, 5, 8]
    for k, shard in enumerate([3, 5, 8]):
        assert queue.state() == (10 * k, False, None)
        queue.done(f"t{k}", shard, 10, 1.0)
    assert queue.state() == (30, True, None)
    assert queue.take("t0") is None


def test_a_ticket_that_lost_its_process_gets_the_same_shard_until_it_is_given_up_by_name(clock):
    queue = ShardQueue([0, 1], 2, clock)
    assert queue.take("a") == 0
    assert queue.take("b") == 1
    assert [queue.take("a"), queue.take("a")] == [0, 0]
    assert queue.take("a") is None
    made, complete, error = queue.state()
    assert (made, complete) == (0, False)
    assert isinstance(error, WorkError) and "shard 0" in str(error) and "died 3 times" in str(error)
    assert queue.take("b") is None, "after an error nobody gets anything"


def test_a_ticket_that_brings_its_shard_back_has_not_failed(clock):
    queue = ShardQueue(list(range(9)), 1, clock)
    for shard in range(9):
        assert queue.take("a") == shard
        queue.done("a", shard, 1, 1.0)
    assert queue.state() == (9, True, None)


def test_free_workers_wait_for_a_late_shard_and_take_it_over(clock):
    queue = ShardQueue([0, 1, 2], 1, clock)
    assert queue.take("slow") == 0
    assert queue.take("fast") == 1
    clock.now = 1.0
    queue.done("fast", 1, 10, 1.0)
    assert queue.take("fast") == 2
    clock.now = 1.2
    queue.done("fast", 2, 10, 0.2)
    # 1.2 s is more than a quick worker needs (0.2 s and half of it more): the slow one is late.
    assert queue.take("fast") == 0
    assert queue.take("third") == WAIT, "just taken over: not late again yet"
    clock.now = 2.0
    assert queue.take("third") == 0
    clock.now = 9.0
    assert queue.take("fourth") == WAIT, "three at one shard are enough"
    queue.done("third", 0, 10, 0.5)
    assert queue.state() == (30, True, None)
    queue.done("fast", 0, 10, 0.5)
    queue.done("slow", 0, 10, 9.0)
    assert queue.state() == (30, True, None), "a shard made by three counts once"
    assert [queue.take(t) for t in ("slow", "fast", "third", "fourth")] == [None] * 4


def test_nothing_is_late_before_anybody_has_finished(clock):
    queue = ShardQueue([0], 1, clock)
    assert queue.take("a") == 0
    clock.now = 1e6
    assert queue.take("b") == WAIT


def test_a_shard_that_was_taken_over_is_not_its_first_workers_failure(clock):
    queue = ShardQueue([0, 1], 0, clock)
    assert queue.take("dies") == 0
    assert queue.take("fast") == 1
    queue.done("fast", 1, 1, 1.0)
    clock.now = 5.0
    assert queue.take("fast") == 0
    queue.done("fast", 0, 1, 1.0)
    assert queue.take("dies") is None
    assert queue.state() == (2, True, None)


def test_the_first_error_counts(clock):
    queue = ShardQueue([0], 1, clock)
    queue.fail(WorkError("one"))
    queue.fail(WorkError("two"))
    assert str(queue.state()[2]) == "one" and queue.take("a") is None
