"""Independent work in threads: order of outcomes, errors, and Ctrl-C."""

from __future__ import annotations

import threading
import time

import pytest

from impactx.run.threads import run_all


def fail():
    raise ValueError("lost it")


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_outcomes_come_in_order_and_an_error_ends_nothing_else(at_once):
    found = run_all([lambda: 1, fail, lambda: 3], at_once)
    assert (found[0], found[2]) == (1, 3) and str(found[1]) == "lost it"


def test_as_many_at_once_as_said_and_no_more():
    lock, now, most = threading.Lock(), [0], [0]

    def piece():
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1

    run_all([piece] * 9, 3)
    assert most == [3]


def test_one_at_a_time_is_done_by_the_caller():
    assert run_all([threading.current_thread] * 2, 1) == [threading.main_thread()] * 2


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_interrupt_ends_all_and_begins_nothing(at_once):
    begun, told = [], []

    def interrupt():
        begun.append("interrupt")
        raise KeyboardInterrupt

    def other():
        begun.append("other")
        time.sleep(0.3)

    with pytest.raises(KeyboardInterrupt):
        run_all([interrupt] + [other] * 5, at_once, on_interrupt=lambda: told.append("told"))
    assert len(begun) <= at_once + 1
    assert told == (["told"] if at_once > 1 else [])
