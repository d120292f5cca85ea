"""The actor in which Ray Tune runs a trial, one epoch a step; the next trial uses it again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ray import tune

from impactx.cluster.errors import is_final, portable
from impactx.run.executor import Task

# A training that is told to stop has so long to complete its epoch's files and its run.
END_SECONDS = 300.0
Report = Callable[[dict[str, float]], bool]  # an epoch's metrics; whether the trial is to stop
TrainTrial = Callable[[Task, Report], Any]


@dataclass(frozen=True)
class Shared:
    """What all trials of a search have in common.

    Attributes:
        tasks: By their steps' keys; a reference in Ray's object store.
        train: Trains one of them.
    """

    tasks: Any
    train: TrainTrial


class TrialActor(tune.Trainable):
    """See Ray Tune's class API; its own function API gives a stopped trial no time to end its run.

    Make a subclass with `shared` and `resources` for each search (`trial_class`).
    """

    shared: ClassVar[Shared]
    resources: ClassVar[dict[str, float]]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What a trial holds."""
        return tune.PlacementGroupFactory([cls.resources])

    def setup(self, config: dict[str, Any]) -> None:
        """Called once an actor, and once a try."""
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same actor for another trial."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._step = config["step"]
        self._rows: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
        self._go, self._stop = threading.Semaphore(0), threading.Event()
        self._thread: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        """Train until the next epoch is done; returns its metrics, or how the trial ended."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        row = self._rows.get()
        if isinstance(row, Exception):
            raise row  # Tune tries again
        return row

    def _train(self) -> None:
        import ray

        def report(row: dict[str, float]) -> bool:
            self._rows.put({k: v for k, v in row.items() if v is not None})
            self._go.acquire()
            return self._stop.is_set()

        try:
            self.shared.train(ray.get(self.shared.tasks)[self._step], report)
        except Exception as error:
            if is_final(error):
                self._rows.put({"done": True, "error": f"{type(error).__name__}: {error}"})
            else:
                self._rows.put(portable(error))
        else:
            self._rows.put({"done": True})

    def cleanup(self) -> None:
        """Tell a training that still runs to stop, and wait until it has."""
        self._stop.set()
        self._go.release()
        if self._thread is not None:
            self._thread.join(END_SECONDS)


def trial_class(shared: Shared, resources: dict[str, float]) -> type[TrialActor]:
    """The actor's class for one search."""
    return type("TrialActor", (TrialActor,), {"shared": shared, "resources": resources})
