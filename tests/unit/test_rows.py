"""The results table: means, paired gains, spreads, and their texts."""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import replace

import pytest

from impactx.experiment.paper import paper_accuracy, published
from impactx.results.rows import Row, results_csv, summarise, table
from impactx.settings import DatasetSettings


def row(approach: str, repeat: int, test: float, *, dataset="cifar10", weight=None, val=0.7, seconds=10.0) -> Row:
    return Row(dataset, "lenet5", approach, repeat, weight, 0.001, 32, 0.1, val, test, 1000, 12, seconds,
               paper_accuracy(dataset, "lenet5", approach), f"/out/models/{approach}{repeat}", f"tests/{approach}{repeat}",
               None, None, None, f"models/{approach}{repeat}", "w")


ROWS = [row("baseline", 0, 0.60), row("impactx", 0, 0.63, weight=0.8), row("baseline", 1, 0.62, seconds=30.0),
        row("impactx", 1, 0.64, weight=0.8), row("impactx", 0, 0.5, dataset="other", weight=0.2)]


def test_summaries_are_means_over_repeats_and_gains_are_paired():
    base, ours, other = summarise(ROWS)
    assert (base.approach, base.repeats, base.gain_mean, base.gain_spread) == ("baseline", 2, None, None)
    assert base.test_mean == pytest.approx(0.61) and base.seconds == 40
    assert base.test_spread == pytest.approx(statistics.stdev([0.60, 0.62]))
    assert ours.gain_mean == pytest.approx(0.025) and ours.gain_spread == pytest.approx(statistics.stdev([0.03, 0.02]))
    assert ours.weight == 0.8 and (ours.paper_accuracy, base.paper_accuracy) == (0.7065, 0.6796)
    # One repeat has no spread; without a baseline there is no gain; the paper knows nothing of other data.
    assert (other.test_spread, other.gain_mean, other.paper_accuracy) == (None, None, None)


def test_a_repeat_without_its_baseline_is_left_out_of_the_gain():
    assert summarise([*ROWS[:2], row("impactx", 7, 0.9, weight=0.8)])[1].gain_mean == pytest.approx(0.03)


def test_the_table_shows_percent_spread_gain_and_the_papers_number():
    lines = table(ROWS).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == "data set model approach lambda repeats val % test % gain over A paper % train s".split()
    assert "A (baseline)" in lines[1] and "61.00 ± 1.41" in lines[1] and "67.96" in lines[1] and "20.0" in lines[1]
    assert "+2.50 ± 0.71" in lines[2] and "0.8" in lines[2] and "70.65" in lines[2]
    assert "50.00" in lines[3] and "±" not in lines[3]


def test_a_table_that_mixes_precisions_names_the_odd_rows():
    rows = [replace(r, train_precision="bfloat16", test_precision="float32",
                    maps_precision="" if r.approach == "baseline" else "float32") for r in ROWS]
    assert table(rows) == table(ROWS)
    rows[3] = replace(rows[3], train_precision="float32")
    rows[4] = replace(rows[4], maps_precision="float32 and tf32")
    assert table(rows).splitlines()[-3:] == [
        "not all in one precision:",
        "  trained in bfloat16: 4 models; cifar10 x lenet5, impactx repeat 1 in float32",
        "  with maps made in float32: 2 models; other x lenet5, impactx repeat 0 in float32 and tf32"]


def test_csv_holds_every_field_at_full_precision():
    text = results_csv([row("impactx", 0, 1 / 3, weight=0.2), row("baseline", 0, 0.5)])
    found = list(csv.DictReader(io.StringIO(text)))
    assert [float(r["test_accuracy"]) for r in found] == [1 / 3, 0.5]
    assert found[0]["weight"] == "0.2" and found[1]["weight"] == "" and found[0]["checkpoint"] == "/out/models/impactx0"
    assert json.loads(json.dumps(row("impactx", 0, 0.1).as_dict()))["approach"] == "impactx"


def test_nothing_gives_an_empty_table():
    assert summarise([]) == [] and len(table([]).splitlines()) == 1


@pytest.mark.parametrize("cell, expected", [
    (("cifar10", "lenet5", "impactx"), 0.7065), (("stl10", "efficientnet_b2", "baseline"), 0.9876),
    (("cifar100", "mobilenet", "abn"), 0.7824), (("cifar100", "lenet5", "wae"), 0.3620),
    (("digits", "lenet5", "impactx"), None), (("cifar10", "lenet5", "lambda0"), None)])
def test_the_papers_numbers(cell, expected):
    found = paper_accuracy(*cell)
    assert found is expected is None or found == pytest.approx(expected)


@pytest.mark.parametrize("change, stands", [({}, True), ({"subset": 5000}, False), ({"source": "auto"}, False),
                                            ({"source": {"kind": "auto", "torchvision": "CIFAR100"}}, False)])
def test_the_papers_numbers_stand_beside_its_own_data_set_alone_and_whole(change, stands):
    dataset = DatasetSettings(**{"name": "cifar10", "source": {"kind": "auto", "torchvision": "CIFAR10"}} | change)
    assert published(dataset, "lenet5", "impactx") == (0.7065 if stands else None)
