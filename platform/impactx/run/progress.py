"""What a job says while it runs: lines that name their cell, and once a minute how far every cell
is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from impactx.timing import duration

log = logging.getLogger("impactx")


class CellLog(logging.LoggerAdapter):
    """Lines that begin with the cell's name."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Put the name in front."""
        return f"{self.extra['cell']}: {msg}", kwargs  # type: ignore[index]


class JobProgress:
    """Knows how far every cell is, and says so. Used by many threads."""

    def __init__(self, cells: int) -> None:
        self._cells, self._started = cells, time.perf_counter()
        self._at: dict[str, str] = {}
        self._epochs: dict[str, dict[str, tuple[float, float]]] = {}
        self._done: set[str] = set()
        self._lock = threading.Lock()

    def at(self, cell: str, what: str) -> None:
        """What a cell is doing now."""
        with self._lock:
            self._at[cell] = what

    def epoch(self, cell: str, unit: str, row: Mapping[str, float]) -> None:
        """An epoch of a cell's training is done."""
        with self._lock:
            self._epochs.setdefault(cell, {})[unit] = (row["epoch"], row["val_accuracy"])

    def ended(self, cell: str, unit: str | None = None) -> None:
        """A training of a cell is over, or the cell itself."""
        with self._lock:
            if unit is None:
                self._done.add(cell)
                self._at.pop(cell, None)
            self._epochs.get(cell, {}).pop(unit or "", None)

    def line(self) -> str:
        """How far every cell is; empty while none is under way."""
        with self._lock:
            done = f", {len(self._done)} of {self._cells} cells done" if self._cells > 1 else ""
            return f"after {duration(time.perf_counter() - self._started)}{done}: " + "; ".join(
                f"{cell}: {what}{self._trainings(cell)}" for cell, what in self._at.items()) if self._at else ""

    @contextlib.contextmanager
    def logged(self, every: float = 60, tell: Callable[[str], object] = str) -> Iterator[None]:
        """Log the line every so many seconds within the block, also while nothing happens.

        tell: called with each line; it must not wait.
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
        """The latest epochs of what is under way: one training by its name, more of them in sum."""
        found = self._epochs.get(cell, {})
        if not found:
            return ""
        if len(found) == 1:
            (name, (epoch, accuracy)), = found.items()
            return f", {name} at epoch {epoch:.0f}, accuracy {accuracy:.4f}"
        epochs = [epoch for epoch, _ in found.values()]
        return (f", {len(found)} under way at epochs {min(epochs):.0f} to {max(epochs):.0f}, accuracies to "
                f"{max(accuracy for _, accuracy in found.values()):.4f}")
