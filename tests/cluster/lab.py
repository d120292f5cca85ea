"""What the tests of this folder share: small experiments, waiting for conditions, and killing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from impactx.approaches.base import Candidate
from impactx.datasets import load_dataset
from impactx.experiment.cell import Cell, Classifier, Configuration, DataFacts
from impactx.experiment.steps.base import Step
from impactx.experiment.steps.maps import Maps
from impactx.experiment.steps.training import Model
from impactx.experiment.workplace import Workplace
from impactx.run.executor import Task
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.run.tracker import RunIdentity
from impactx.settings import ClusterSettings, ExperimentSettings, ModelResources

IMAGES = 101  # a prime: batches and shares never come out even


def experiment(**changes: Any) -> ExperimentSettings:
    """A small experiment on the digits."""
    return ExperimentSettings.model_validate({
        "datasets": {"digits": {"name": "digits", "source": "digits", "subset": IMAGES, "augmentation": {
            "flip": False, "shift": 2}}},
        "models": {"lenet5": {"name": "lenet5", "architecture": "lenet5"}},
        "grid": {"learning_rate": [0.002, 0.004], "batch_size": [32], "validation_fraction": [0.2]},
        "training": {"epochs": 3, "patience": 3, "memory_mb": 64},
        "attribution": {"method": "partition", "max_evals": 24, "batch_size": 10}, "maps": {"shard_size": 10},
        "evaluation": {"map_images": 0},
        "approaches": {"impactx": {"kind": "impactx", "lambdas": [0.8]}}} | changes)


class Lab:
    """An output folder and the plan of an experiment in it."""

    def __init__(self, folder: Path, cache: Path, **changes: Any) -> None:
        self.settings = experiment(**changes)
        self.place = Workplace(str(folder), str(folder / "no-data"), str(cache))
        self.dataset = self.settings.datasets["digits"]
        data = load_dataset(self.dataset, self.place.data_root, self.place.cache)
        self.cell = Cell(self.settings, self.dataset, self.settings.models["lenet5"], DataFacts(
            data.fingerprint, len(data.train.labels), data.num_classes, data.image_size, data.class_names))

    @property
    def local(self) -> LocalExecutor:
        """The executor that everything is compared with."""
        return LocalExecutor(self.place, NoTracker())

    def ray(self, resources: dict[str, Any] | None = None, device: str = "cpu", **cluster: Any):
        """The executor under test; it leaves alone the GPU that only the cluster's scheduler knows."""
        from impactx.cluster.executor import RayExecutor

        return RayExecutor(ClusterSettings(device=device, **cluster), self.place, NoTracker(),
                           {"lenet5": ModelResources.model_validate(resources or {})})

    def a(self, fraction: float = 0.2, rate: float = 0.004) -> Model:
        """The training of the classifier A."""
        return self.cell.classifier(Configuration(rate, 32, fraction), 0)

    def trained(self, a: Model) -> Classifier:
        """The trained A."""
        return Classifier(a, a.ref(self.place.artifacts.result(a)))

    def maps(self, a: Model) -> Maps:
        """The making of A's maps; A must be trained."""
        return self.cell.maps(self.trained(a), self.settings.attribution)

    def stage2(self, a: Model, weight: float = 0.8) -> Model:
        """The training of IMPACTX; A must be trained."""
        return self.cell.approach_model("impactx", Candidate(weight), self.trained(a))


def task(step: Step) -> Task:
    """A step as executors get it."""
    return Task(step, RunIdentity(f"job/{step.key}", step.name, "job"))


def ignore(*args: Any) -> None:
    """A callback that does nothing."""


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Wait until the condition holds; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return value


def descendants(pid: int) -> dict[int, str]:
    """The processes below one: pid -> command line. Never those of another cluster on this machine."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:  # it ended meanwhile
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return {child: names[child] for child in found}


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, which can be filled."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(place)],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take all the space that is left; the file that does."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(b"\0" * size)
    return filler


def gone(pids: dict[int, str]) -> bool:
    """Whether these processes have ended. A pid that another program got meanwhile does not count."""
    left = []
    for pid, line in pids.items():
        with contextlib.suppress(OSError):
            now = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            if now and now.split()[0] == line.split()[0]:
                left.append(pid)
    return not left


def kill(name: str, pid: int | None = None, number: int = signal.SIGKILL) -> list[int]:
    """Send a signal to the Ray processes of this name below a process (this one); their pids."""
    pids = [child for child, line in descendants(pid or os.getpid()).items() if line.startswith(f"ray::{name}")]
    for child in pids:
        os.kill(child, number)
    return pids
