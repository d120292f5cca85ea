"""What a job says while it runs: lines that name their cell, and once a minute how far every cell is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from impactx.timing import duration

log = logging.getLogger("impactx")


class CellLog(logging.LoggerAdapter):
    """Lines that begin with the cell's name."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Put the name in front."""
        return f"{self.extra['cell']}: {msg}", kwargs  # type: ignore[index]


class Summary:
    """Says once a minute how far every cell is; nothing is said while nothing happens. Used by many threads."""

    def __init__(self, cells: int, every: float = 60, told: Callable[[str], object] = str) -> None:
        """told: called with each line; it must not wait."""
        self._cells, self._every, self.told = cells, every, told
        self._started = self._last = time.perf_counter()
        self._at: dict[str, str] = {}
        self._epochs: dict[str, dict[str, tuple[float, float]]] = {}
        self._done: set[str] = set()
        self._lock = threading.Lock()

    def at(self, cell: str, what: str) -> None:
        """What a cell is doing now."""
        with self._lock:
            self._at[cell] = what
            self._say_if_due()

    def epoch(self, cell: str, unit: str, row: Mapping[str, float]) -> None:
        """An epoch of a cell's training is done."""
        with self._lock:
            self._epochs.setdefault(cell, {})[unit] = (row["epoch"], row["val_accuracy"])
            self._say_if_due()

    def ended(self, cell: str, unit: str | None = None) -> None:
        """A training of a cell is over, or the cell itself."""
        with self._lock:
            if unit is None:
                self._done.add(cell)
                self._at.pop(cell, None)
            self._epochs.get(cell, {}).pop(unit or "", None)

    def _say_if_due(self) -> None:
        now = time.perf_counter()
        if now - self._last < self._every:
            return
        self._last = now
        done = f", {len(self._done)} of {self._cells} cells done" if self._cells > 1 else ""
        line = f"after {duration(now - self._started)}{done}: " + "; ".join(
            f"{cell}: {what}{self._trainings(cell)}" for cell, what in self._at.items())
        log.info("%s", line)
        self.told(line)

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
