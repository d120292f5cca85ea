"""The order of an experiment stands in one file: what changes there changes everywhere.

The job, its journal, the tracker, the dry run, the count that prices are made of, and the report: each test replaces the
flow alone and looks at all of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pytest

from impactx.configuration import load_settings
from impactx.costs.count import Count, count
from impactx.costs.dry_run import dry_run
from impactx.costs.measured import JUDGING, MAPS, Making, Measured, Slots
from impactx.costs.price_list import price_list
from impactx.costs.pricing import price_cell, probes_of, unpriced_of
from impactx.costs.rates import TrainingRate
from impactx.experiment import flow
from impactx.experiment.artifacts import PREDICTIONS, Artifacts, read_arrays
from impactx.experiment.cell import Cell, Classifier
from impactx.experiment.groups import Flow, do
from impactx.experiment.preparation import prepare
from impactx.experiment.steps.base import OUTSIDE_KEY, Context, Result, Step
from impactx.experiment.steps.maps import Maps
from impactx.experiment.steps.quality import MapQuality
from impactx.experiment.steps.test import Test
from impactx.explain.methods.occlusion import Occlusion
from impactx.report import build_report
from impactx.results.export import StepExport, export_job, map_scores
from impactx.run.cell import PartsFailed
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoRun, NoTracker
from impactx.storage import Storage

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = ("approach=[impactx]", "datasets.digits.subset=60", "grid.learning_rate=[0.004]", "grid.batch_size=[16]",
        "grid.validation_fraction=[0.2]", "training.epochs=2", "attribution.max_evals=12", "maps.shard_size=30",
        "approaches.impactx.lambdas=[0.8]", "repeats=1", "evaluation.map_images=10", "evaluation.resamples=100",
        "evaluation.orders=[own]")
KINDS = ["trial", "model", "maps", "model", "test", "test", "map_quality", "map_quality"]


class Runs(NoTracker):
    """Keeps what the job tells it: the role, parent and numbers of each run, by its name."""

    def __init__(self) -> None:
        self.roles: dict[str, str] = {}
        self.parents: dict[str, str | None] = {}
        self.metrics: dict[str, dict[str, float]] = {}

    def run(self, identity):
        runs, name = self, identity.name
        self.roles[name], self.parents[name] = identity.tags["impactx.role"], identity.parent

        class Run(NoRun):
            def log_metrics(self, metrics, step=None):
                runs.metrics.setdefault(name, {}).update(metrics)

        return Run()


class Everywhere:
    """A small experiment in this process, and what each part of the package says of it."""

    def __init__(self, output: Path, shared: Path) -> None:
        self.settings = load_settings("demo", [*TINY, f"output={output}", f"cache={shared}", f"data_root={shared}"],
                                      CONFIGS)
        prepared = prepare(self.settings)
        self.cell, self.place, self.tracker = prepared.cells[0], prepared.place, Runs()
        self.before = dry_run(self.settings)
        self.counted = count(self.cell)
        self.job = Job(self.settings, prepared.cells, self.place, LocalExecutor(self.place, self.tracker), self.tracker)

    def run(self) -> Everywhere:
        self.rows = self.job.run()
        self.job.check()
        return self

    @property
    def steps(self) -> Sequence[StepExport]:
        """Of the export, which is read from the journal."""
        (cell,) = export_job(self.place.artifacts.storage, self.job.key).cells
        assert cell.missing == [] and cell.error is None
        return cell.steps

    def report(self) -> dict[str, bytes]:
        storage = self.place.artifacts.storage
        return build_report(export_job(storage, self.job.key), lambda folder: map_scores(storage, folder))

    def page(self) -> str:
        page = re.sub(r"data:image/png;base64,[\w+/=]*", "", self.report()["report.html"].decode())
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))

    def prices(self) -> str:
        """What --plan says before the job, by rates that are given."""
        slots = Slots(1, 1, 0)
        rates = Measured({self.cell.model.name: dict.fromkeys(("trial", "model", "maps on CPUs", JUDGING), slots)}, 1, 0)
        for probe in probes_of([self.cell]):
            for slot in {MAPS: ["maps on CPUs"], JUDGING: [JUDGING]}.get(probe.subject, ["trial", "model"]):
                if probe.making:
                    rates.add_maps(slot, probe, 1, [1.0])
                else:
                    rates.add_training(slot, probe, 1, [TrainingRate(1, 0.001, 0)])
        nothing = Artifacts(Storage(Path(self.place.output, "nothing")))
        return price_list([price_cell(self.cell, rates, nothing)], rates, 1)

    def finished(self) -> Count:
        """The same count, of what is there now."""
        return count(self.cell, self.place.artifacts)


def kinds(counted: Count) -> list[str]:
    return [step.kind for group in counted.groups for step in group.group.steps]


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Decoded images and unpacked maps."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def carried_out(tmp_path, shared, monkeypatch) -> Callable[..., Everywhere]:
    """Carry out a flow instead of the experiment's own."""
    def run(order: Callable[[Cell], Flow] | None = None) -> Everywhere:
        if order is not None:
            monkeypatch.setattr(flow, "flow", order)
        return Everywhere(tmp_path / "out", shared).run()
    return run


def test_the_flow_as_it_stands(carried_out):
    """What the three tests below differ from."""
    done = carried_out()
    assert [step.kind for step in done.steps] == kinds(done.counted) == KINDS
    assert sorted(done.tracker.roles.values()) == sorted([*KINDS, "job", "cell"])
    assert "map quality: 2, maps of every model on 10 test images" in done.before
    assert "forward passes to judge maps" in done.before and "judging:" in done.prices() and "Other steps" not in done.page()
    assert not any(group.left for group in done.finished().groups) and unpriced_of(done.counted) == {}


def test_a_step_that_is_taken_out_is_gone_everywhere(carried_out):
    def without_map_quality(cell: Cell) -> Flow:
        classifiers = yield from flow.stage1(cell)
        others = yield from flow.stage2(cell, [Classifier(a, a.ref(result)) for a, result in classifiers])
        yield from do("tests", [cell.test(model, result) for model, result in classifiers + others])

    done = carried_out(without_map_quality)
    assert done.settings.evaluation.map_images == 10  # it is still asked for, and the flow does not do it
    assert [step.kind for step in done.steps] == kinds(done.counted) == KINDS[:-2]
    assert not list(Path(done.place.output).glob("map_quality/*"))
    assert sorted(done.tracker.roles.values()) == sorted([*KINDS[:-2], "job", "cell"])
    assert "map quality" not in done.before and "to judge maps" not in done.before
    assert done.counted.steps(MapQuality) == []
    assert not [probe for probe in probes_of([done.cell]) if probe.subject == JUDGING]
    assert "judging" not in done.prices()
    assert not [name for name in done.report() if name.startswith(("morf-", "fidelity-", "examples-"))]
    assert [(row.approach, row.map_quality) for row in done.rows] == [("baseline", None), ("impactx", None)]
    assert not any(group.left for group in done.finished().groups)


def test_one_more_instance_of_a_known_step_is_put_in_by_the_flow_alone(carried_out):
    def with_other_maps(cell: Cell) -> Flow:
        classifiers = yield from flow.stage1(cell)
        trained = [Classifier(a, a.ref(result)) for a, result in classifiers]
        yield from do("maps by occlusion", [cell.maps(a, Occlusion(window=8, stride=8)) for a in trained])
        others = yield from flow.stage2(cell, trained)
        yield from flow.test(cell, classifiers + others)

    name, making = "maps by occlusion repeat 0", Making(Occlusion(window=8, stride=8))
    done = carried_out(with_other_maps)
    expected = [*KINDS[:2], "maps", *KINDS[2:]]
    assert [step.kind for step in done.steps] == kinds(done.counted) == expected
    store = done.steps[2]
    assert (store.name, store.group, store.state) == (name, "maps by occlusion", "finished")
    assert store.result.images == 60 and store.parameters["attribution"]["window"] == 8
    assert done.job.map_folders[0].endswith(store.folder) and len(done.job.map_folders) == 2
    assert done.tracker.roles[name] == "maps" and done.tracker.metrics[name]["maps_images"] == 60
    assert done.tracker.parents[name] == done.tracker.parents["A repeat 0"]
    # 16 places of the window and the image itself; 60 maps of 12 evaluations by the other attribution.
    each = making.attribution.evaluations((32, 32))
    assert f"maps by occlusion: 1 stores of 60 maps, {60 * each:,} evaluations, 2 shards" in done.before
    assert f"{60 * (each + 12):,} explainer evaluations in 4 shards" in done.before
    assert [step.name for step in done.counted.steps(Maps)] == [name, "maps repeat 0"]
    assert making in [probe.making for probe in probes_of([done.cell]) if probe.subject == MAPS]
    assert f"60 by occlusion, {60 * each:,} evaluations" in done.prices()
    assert "maps by occlusion" in done.report()["costs.csv"].decode() and "maps by occlusion" in done.page()
    assert not any(group.left for group in done.finished().groups)


# ---- a kind of step that the package does not know

class AgreementResult(Result):
    """How often two models agree; agreement: a fraction of the test images."""

    agreement: float
    images: int


class Agreement(Step[AgreementResult]):
    """How many test images two final models label alike, whether they are right or not."""

    kind: ClassVar[str] = "agreement"
    result_type: ClassVar[type[Result]] = AgreementResult
    title: ClassVar[str] = "agreement"

    weights: tuple[str, str]
    test: str
    tests: Annotated[tuple[str, str], OUTSIDE_KEY]

    @classmethod
    def of(cls, a: Test, other: Test) -> Agreement:
        return cls(name=f"agreement of {other.approach_name} with A repeat {other.repeat}",
                   dataset_name=a.dataset_name, model_name=a.model_name, approach_name=other.approach_name,
                   repeat=a.repeat, weights=(a.weights, other.weights), test=a.test, tests=(a.folder, other.folder))

    def placeholder(self) -> AgreementResult:
        return AgreementResult(seconds=0, agreement=0, images=0)

    def inputs(self) -> dict[str, str]:
        return {"a": self.tests[0], "other": self.tests[1]}

    def execute(self, context: Context) -> AgreementResult:
        started, artifacts = time.perf_counter(), context.place.artifacts
        a, other = (read_arrays(artifacts.storage, f"{test}/{PREDICTIONS}")["probabilities"].argmax(1)
                    for test in self.tests)
        result = AgreementResult(agreement=float((a == other).mean()), images=len(a),
                                 seconds=time.perf_counter() - started)
        artifacts.finish(self, result)
        return result


def with_agreement(cell: Cell) -> Flow:
    classifiers = yield from flow.stage1(cell)
    others = yield from flow.stage2(cell, [Classifier(a, a.ref(result)) for a, result in classifiers])
    yield from flow.test(cell, classifiers + others)
    of_a = {model.repeat: cell.test(model, result) for model, result in classifiers}
    tests = [cell.test(model, result) for model, result in others]
    yield from do("agreement with A", [Agreement.of(of_a[test.repeat], test) for test in tests])


def test_a_step_of_a_new_kind_needs_its_record_and_its_function_alone(carried_out):
    name = "agreement of impactx with A repeat 0"
    done = carried_out(with_agreement)
    assert [step.kind for step in done.steps] == kinds(done.counted) == [*KINDS, "agreement"]
    step = done.steps[-1]
    assert (step.name, step.group, step.state) == (name, "agreement with A", "finished")
    a, other = (np.load(Path(done.place.output, row.test, PREDICTIONS))["probabilities"].argmax(1) for row in done.rows)
    agreement = float((a == other).mean())
    assert step.result.values == {"agreement": agreement, "images": len(a)} and step.result.seconds > 0
    assert done.tracker.roles[name] == "agreement" and done.tracker.parents[name] == done.tracker.parents["A repeat 0"]
    assert done.tracker.metrics[name]["agreement"] == agreement
    assert "    agreement with A: 1" in done.before.splitlines()
    assert unpriced_of(done.counted) == {"agreement with A": 1}
    assert "  not priced: 1 of agreement with A" in done.prices().splitlines()
    assert "    agreement with A: 1; 1 finished" in dry_run(done.settings).splitlines()
    assert unpriced_of(done.finished()) == {} and not any(group.left for group in done.finished().groups)
    shown = f"agreement {name} finished agreement {agreement:g}, images {len(a)}"
    assert "Other steps" in done.page() and shown in done.page()
    assert name in done.report()["other-steps.csv"].decode() and "agreement" in done.report()["costs.csv"].decode()
    # Like every step it is done once.
    kept = list(Path(done.place.output).glob("agreements/*/result.json"))
    before = [file.stat().st_mtime_ns for file in kept]
    carried_out(with_agreement)
    assert len(kept) == 1 and [file.stat().st_mtime_ns for file in kept] == before


def test_a_step_of_a_new_kind_that_fails_is_named_and_takes_nothing_along(carried_out, monkeypatch):
    def fails(self, context):
        raise ValueError("no two models are alike")

    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "execute", fails)
        with pytest.raises(PartsFailed, match="agreement of impactx with A repeat 0: ValueError: no two models"):
            carried_out(with_agreement)
    done = carried_out(with_agreement)  # the same command tries it again, and it alone
    assert [row.approach for row in done.rows] == ["baseline", "impactx"]
    assert [step.state for step in done.steps] == ["finished"] * 9
    assert done.before.count("; 1 finished") + done.before.count("; 2 finished") == len(done.counted.groups) - 1
