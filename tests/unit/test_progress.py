"""What a job says of its cells once a minute."""

from __future__ import annotations

import logging
import queue
import time

from impactx.run.progress import CellLog, JobProgress


def row(epoch, accuracy):
    return {"epoch": epoch, "val_accuracy": accuracy}


def test_one_line_for_all_cells():
    progress = JobProgress(3)
    assert progress.line() == ""
    progress.at("a", "stage 1, 2 of 4 trials")
    progress.epoch("a", "t3", row(4, 0.5))
    progress.at("b", "maps repeat 0, 5 of 9 maps")
    assert progress.line().startswith("after ") and progress.line().endswith(
        "0 of 3 cells done: a: stage 1, 2 of 4 trials, t3 at epoch 4, accuracy 0.5000; b: maps repeat 0, 5 of 9 maps")
    progress.epoch("a", "t4", row(2, 0.75))
    assert "2 under way at epochs 2 to 4, accuracies to 0.7500" in progress.line()
    progress.ended("a", "t3")
    assert "t4 at epoch 2" in progress.line()
    progress.ended("a")
    assert progress.line().endswith("1 of 3 cells done: b: maps repeat 0, 5 of 9 maps")


def test_the_line_is_said_again_and_again_until_the_end(caplog):
    progress, told = JobProgress(1), queue.Queue()
    with caplog.at_level(logging.INFO, "impactx"):
        with progress.logged(every=0.01, tell=told.put):
            time.sleep(0.1)
            assert told.empty(), "nothing is under way yet"
            progress.at("a", "stage 1")
            lines = [told.get(timeout=30) for _ in range(3)]
        count = len(caplog.messages)
        time.sleep(0.1)
    assert all(line.endswith(": a: stage 1") for line in lines) and lines == caplog.messages[:3]
    assert len(caplog.messages) == count


def test_lines_begin_with_the_cell(caplog):
    with caplog.at_level(logging.INFO, "impactx"):
        CellLog(logging.getLogger("impactx"), {"cell": "cifar10 x lenet5"}).info("stage 1: %d trials", 3)
    assert caplog.messages == ["cifar10 x lenet5: stage 1: 3 trials"]
