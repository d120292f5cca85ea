"""A job whose number of repeats a pilot proposed, and one whose repeats were added after a look: real small jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from impactx.cli.options import experiment_options
from impactx.configuration import ConfigurationError, load_settings
from impactx.experiment.preparation import prepare
from impactx.experiment.steps.base import StepError
from impactx.report import build_report
from impactx.results.export import export_job, map_scores
from impactx.results.records import Start
from impactx.run.job import Job
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker

ROOT = Path(__file__).resolve().parents[2]
TINY = ("datasets.digits.subset=100", "grid.learning_rate=[0.004]", "grid.batch_size=[16]", "training.epochs=2",
        "grid.validation_fraction=[0.2]", "attribution.max_evals=50", "evaluation.map_images=0",
        "approach=[impactx,lambda0,shuffled]", "approaches.impactx.lambdas=[0.8]", "approaches.shuffled.lambdas=[0.8]",
        "approaches.lambda0.learning_rate_factors=[1]")


class Recorder(LocalExecutor):
    """Does the work, and writes down which trainings."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.trained: list[str] = []

    def train(self, task, on_epoch):
        self.trained.append(task.step.name)
        return super().train(task, on_epoch)


def started(folder: Path, *overrides: str, pilot: bool = False) -> Job:
    settings = load_settings("demo", [*TINY, f"output={folder}", f"cache={folder / 'cache'}", f"data_root={folder}",
                                      *overrides], ROOT / "configs")
    prepared, tracker = prepare(settings), NoTracker()
    job = Job(settings, prepared.cells, prepared.place, Recorder(prepared.place, tracker), tracker,
              start=Start(pilot=pilot))
    job.rows = job.run()
    return job


def page(job: Job) -> str:
    storage = job.artifacts.storage
    return build_report(export_job(storage, job.key), lambda folder: map_scores(storage, folder))["report.html"].decode()


def test_a_pilot_shows_a_number_and_is_not_counted_and_a_look_is_said(tmp_path):
    pilot = started(tmp_path, "repeats=2", pilot=True)
    folder = tmp_path / "jobs" / pilot.key
    assert "Run repeats=" in pilot.proposal and "impactx over shuffled: " in pilot.proposal
    assert pilot.evidence.cells == [] and not {"evidence.json", "results.csv"} & {f.name for f in folder.iterdir()}
    assert "The first 2 repeats are a pilot, whose accuracies are not shown." in page(pilot)
    with pytest.raises(StepError, match="repeats = 2: the first 2 repeats of this job were a pilot"):
        started(tmp_path, "repeats=2")

    # The whole job goes on in the same folder; it trains what the pilot did not, and counts only that.
    whole = started(tmp_path, "repeats=4")
    assert whole.key == pilot.key and {name[-1] for name in whole.executor.trained} == {"2", "3"}
    assert {row.repeat for row in whole.rows} == {2, 3}
    cell, = whole.evidence.cells
    assert [entry.repeats for entry in cell.approaches] == [[2, 3]] * 4
    assert cell.sentence.endswith("The first 2 repeats were a pilot, which is not counted.")

    # One repeat more, after its results could be seen; then another margin.
    more = started(tmp_path, "repeats=5", "evaluation.margin=2")
    assert more.key == whole.key and {name[-1] for name in more.executor.trained} == {"4"}
    said = more.evidence.cells[0].sentence
    assert "Repeats were added after a look at the results of 4, for which nothing is corrected" in said
    assert "When results were first seen, the margin was 0.5 points." in said
    assert "added after a look at the results of 4" in page(more) and "repeats for 2 points" in page(more)
    seen = [start.seen for start in export_job(more.artifacts.storage, more.key).record.starts]
    assert [look and look.repeats for look in seen] == [None, None, 4]


def test_a_pilot_of_one_repeat_is_refused():
    options = experiment_options("", str(ROOT / "jobs" / "full_grid.py"), ["--pilot", "--preset", "demo", "repeats=1"])
    with pytest.raises(ConfigurationError, match="--pilot with repeats = 1"):
        options.load()
    options = experiment_options("", str(ROOT / "jobs" / "full_grid.py"), ["--pilot", "--preset", "demo", "repeats=2"])
    assert options.load().repeats == 2 and options.pilot
