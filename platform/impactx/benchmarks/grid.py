"""The overhead of a trial: short trials with all that an experiment has (Tune, storage, MLflow).

A slot of the cluster is busy with a trial from the end of the one before it to its own end. Its
overhead is that time without the seconds of its epochs, which the loop itself counts under the same
load: Tune's hand-over, the set-up of model and data, the result's files, and the tracker's run. The
first trial of each slot starts a process and is left out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from impactx.cluster.connection import connected
from impactx.experiment.preparation import prepare
from impactx.experiment.steps.training import TrainingResult, Trial
from impactx.run.executor import Task
from impactx.run.no_tracker import NoTracker
from impactx.run.tracker import RunIdentity, Tracker
from impactx.settings import ExperimentSettings
from impactx.tracking import make_tracker


@dataclass(frozen=True)
class Case:
    """The overhead of trials, with or without tracking.

    Attributes:
        tracked: Whether runs were logged to MLflow.
        trials: Number of trials.
        slots: Number of trials at the same time.
        start: Seconds until each slot had finished its first trial.
        loop: Seconds of a trial's epochs, the mean over the trials after the first of each slot.
        overhead: Seconds that such a trial took beside them, the mean.
    """

    tracked: bool
    trials: int
    slots: int
    start: float
    loop: float
    overhead: float

    def line(self) -> str:
        """Return a line of the printed table."""
        tracking = "MLflow (sqlite)" if self.tracked else "no tracking"
        return (f"{tracking:16} {self.trials:7d} {self.slots:6d} {self.start:9.2f} "
                f"{self.loop:8.2f} {self.overhead:12.3f}")


HEAD = (f"{'tracking':16} {'trials':>7} {'slots':>6} {'start s':>9} {'loop s':>8} "
        f"{'overhead s':>12}")


def experiment(folder: Path, trials: int, epochs: int, images: int) -> ExperimentSettings:
    """Return an experiment with trials on scikit-learn's digits that differ in learning rate.

    Args:
        folder: Where everything is written.
        trials: Number of trials.
        epochs: Epochs of each trial.
        images: Images in an epoch, before validation images are taken off.
    """
    return ExperimentSettings.model_validate({
        "name": "benchmark", "output": str(folder / "output"), "data_root": str(folder),
        "cache": str(folder / "cache"),
        "datasets": {"digits": {"name": "digits", "source": "digits", "subset": images}},
        "models": {"lenet5": {"name": "lenet5", "architecture": "lenet5"}},
        "grid": {"learning_rate": [round(0.001 + 1e-5 * k, 6) for k in range(trials)],
                 "batch_size": [32], "validation_fraction": [0.2]},
        "training": {"epochs": epochs, "patience": epochs}})


def measure(folder: Path, *, trials: int, epochs: int, images: int, slots: int,
            tracked: bool) -> Case:
    """Run the trials on the connected cluster and measure them.

    Args:
        folder: As in `experiment`, like trials, epochs and images.
        trials: See there.
        epochs: See there.
        images: See there.
        slots: Number of trials that the cluster runs at the same time.
        tracked: Whether runs are logged to MLflow.

    Raises:
        RuntimeError: A trial fails.
    """
    from impactx.cluster.executor import RayExecutor

    settings = experiment(folder, trials, epochs, images)
    prepared = prepare(settings)
    tracker: Tracker = make_tracker(settings) if tracked else NoTracker()
    tracker.prepare()
    cell, ends, loops = prepared.cells[0], [], []

    def on_result(trial: Trial, result: TrainingResult | None, error: str | None) -> None:
        if result is None:
            raise RuntimeError(f"{trial.name}: {error}")
        ends.append(time.perf_counter())
        loops.append(result.seconds)

    with tracker.run(RunIdentity("benchmark", "benchmark")):
        steps = [cell.classifier_trial(point) for point in cell.configurations()]
        tasks = [Task(step, RunIdentity(f"benchmark/{step.key}", step.name, "benchmark"))
                 for step in steps]
        started = time.perf_counter()
        executor = RayExecutor(settings.cluster, prepared.place, tracker, {
            name: model.resources for name, model in settings.models.items()})
        executor.search(tasks, on_result, lambda trial, row: None)
        tracker.close_unfinished("benchmark")
    later = trials - slots  # trials after the first of each slot
    loop = sum(loops[slots:]) / later
    return Case(tracked, trials, slots, ends[slots - 1] - started, loop,
                (ends[-1] - ends[slots - 1]) * slots / later - loop)


def run(*, trials: int, epochs: int, images: int, cpus: int) -> list[Case]:
    """Measure with and without tracking on a local cluster, and print a line for each.

    Args:
        trials: As in `experiment`, like epochs and images.
        epochs: See there.
        images: See there.
        cpus: CPUs of the cluster, one for each trial.
    """
    from impactx.settings import ClusterSettings

    print(f"{trials} trials of {epochs} epochs over {images} images, one CPU each\n{HEAD}")
    cases = []
    with connected(ClusterSettings(num_cpus=cpus, device="cpu"), {}):
        for tracked in (False, True):
            with tempfile.TemporaryDirectory(prefix="impactx-benchmark-") as folder:
                cases.append(measure(Path(folder), trials=trials, epochs=epochs, images=images,
                                     slots=cpus, tracked=tracked))
            print(cases[-1].line(), flush=True)
    return cases
