"""What a job says of its cells once a minute."""

from __future__ import annotations

import logging

from impactx.experiment.summary import CellLog, Summary


def row(epoch, accuracy):
    return {"epoch": epoch, "val_accuracy": accuracy}


def said(caplog, summary):
    """The line that the next event brings."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "impactx"):
        summary.at("b", "maps repeat 0, 5 of 9 maps")
    return caplog.messages


def test_one_line_a_minute_for_all_cells(caplog):
    summary = Summary(3, every=60)
    assert said(caplog, summary) == []
    told = []
    summary = Summary(3, every=0, told=told.append)
    summary.at("a", "stage 1, 2 of 4 trials")
    summary.epoch("a", "t3", row(4, 0.5))
    (line,) = said(caplog, summary)
    assert line.startswith("after ") and line.endswith(
        "0 of 3 cells done: a: stage 1, 2 of 4 trials, t3 at epoch 4, accuracy 0.5000; b: maps repeat 0, 5 of 9 maps")
    assert told[-1] == line
    summary.epoch("a", "t4", row(2, 0.75))
    assert "2 under way at epochs 2 to 4, accuracies to 0.7500" in said(caplog, summary)[0]
    summary.ended("a", "t3")
    assert "t4 at epoch 2" in said(caplog, summary)[0]
    summary.ended("a")
    assert said(caplog, summary)[0].endswith("1 of 3 cells done: b: maps repeat 0, 5 of 9 maps")


def test_lines_begin_with_the_cell(caplog):
    with caplog.at_level(logging.INFO, "impactx"):
        CellLog(logging.getLogger("impactx"), {"cell": "cifar10 x lenet5"}).info("stage 1: %d trials", 3)
    assert caplog.messages == ["cifar10 x lenet5: stage 1: 3 trials"]
