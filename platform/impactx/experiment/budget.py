"""A budget of training time."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from typing import Any

HOUR = 3600.0


class Budget:
    """Hours of training, summed over trials: those of earlier tries and of trials under way count as well."""

    def __init__(self, hours: float | None, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """hours: None for no limit; earlier: results (or what stopped trials had come to) with their `seconds`."""
        self._limit = None if hours is None else hours * HOUR
        self._ended = sum(result["seconds"] for result in earlier)
        self._under_way: dict[str, float] = {}
        self._lock = threading.Lock()

    def epoch(self, key: str, row: Mapping[str, float]) -> None:
        """An epoch of a trial is done."""
        with self._lock:
            self._under_way[key] = self._under_way.get(key, 0.0) + row["seconds"]

    def ended(self, key: str, result: Mapping[str, Any]) -> None:
        """A trial is finished: its result knows the epochs of earlier tries as well."""
        with self._lock:
            self._under_way.pop(key, None)
            self._ended += result["seconds"]

    @property
    def left(self) -> float:
        """Seconds: infinitely many without a limit."""
        with self._lock:
            return math.inf if self._limit is None else max(
                0.0, self._limit - (self._ended + sum(self._under_way.values())))

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return not self.left
