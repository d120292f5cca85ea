"""What a job says while it runs: lines that name their cell, and a summary once a minute."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from impactx.timing import duration

log = logging.getLogger("impactx")


class CellLog(logging.LoggerAdapter[logging.Logger]):
    """Lines that begin with the cell's name."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Put the name in front."""
        return f"{self.extra['cell']}: {msg}", kwargs  # type: ignore[index]


class JobProgress:
    """Knows how far every cell is, and says so; many threads may use it."""

    def __init__(self, cells: int) -> None:
        self._cells, self._started = cells, time.perf_counter()
        self._at: dict[str, str] = {}
        self._epochs: dict[str, dict[str, tuple[float, float]]] = {}
        self._done: set[str] = set()
        self._lock = threading.Lock()

    def at(self, cell: str, what: str) -> None:
        """Note what a cell is doing now."""
        with self._lock:
            self._at[cell] = what

    def epoch(self, cell: str, step: str, row: Mapping[str, float]) -> None:
        """Note an epoch of a cell's training."""
        with self._lock:
            self._epochs.setdefault(cell, {})[step] = (row["epoch"], row["val_accuracy"])

    def ended(self, cell: str, step: str | None = None) -> None:
        """Note that a step of a cell is over, or the cell itself."""
        with self._lock:
            if step is None:
                self._done.add(cell)
                self._at.pop(cell, None)
            self._epochs.get(cell, {}).pop(step or "", None)

    def line(self) -> str:
        """Return how far every cell is; empty while none is under way."""
        with self._lock:
            done = f", {len(self._done)} of {self._cells} cells done" if self._cells > 1 else ""
            cells = [f"{cell}: {what}{self._trainings(cell)}" for cell, what in self._at.items()]
            since = duration(time.perf_counter() - self._started)
            return f"after {since}{done}: {'; '.join(cells)}" if cells else ""

    @contextlib.contextmanager
    def logged(self, every: float = 60, tell: Callable[[str], object] = str) -> Iterator[None]:
        """Log the line regularly within the block, also while nothing happens.

        Args:
            every: Seconds between two lines.
            tell: Called with each line; it must not wait.
        """
        over = threading.Event()

        def repeat() -> None:
            while not over.wait(every):
                if line := self.line():
                    log.info("%s", line)
                    tell(line)

        thread = threading.Thread(target=repeat, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _trainings(self, cell: str) -> str:
        """Return the latest epochs: of one training with its name, of several in sum."""
        trainings = self._epochs.get(cell, {})
        if not trainings:
            return ""
        if len(trainings) == 1:
            (name, (epoch, accuracy)), = trainings.items()
            return f", {name} at epoch {epoch:.0f}, accuracy {accuracy:.4f}"
        epochs = [epoch for epoch, _ in trainings.values()]
        return (f", {len(trainings)} under way at epochs {min(epochs):.0f} to {max(epochs):.0f}, "
                f"accuracies to {max(accuracy for _, accuracy in trainings.values()):.4f}")
