"""A budget of training time."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable

HOUR = 3600.0


class Budget:
    """Hours of training, summed over trials; earlier tries and trials under way count as well."""

    def __init__(self, hours: float | None, earlier: Iterable[float] = ()) -> None:
        """Begin a budget.

        Args:
            hours: None for no limit.
            earlier: Seconds of trials that have ended, or were stopped.
        """
        self._limit = None if hours is None else hours * HOUR
        self._ended = math.fsum(earlier)
        self._under_way: dict[str, float] = {}
        self._lock = threading.Lock()

    def epoch(self, key: str, seconds: float) -> None:
        """An epoch of a trial is done."""
        with self._lock:
            self._under_way[key] = self._under_way.get(key, 0.0) + seconds

    def ended(self, key: str, seconds: float) -> None:
        """A trial is finished; its seconds hold the epochs of earlier tries as well."""
        with self._lock:
            self._under_way.pop(key, None)
            self._ended += seconds

    @property
    def left(self) -> float:
        """Seconds that are left; infinitely many without a limit."""
        with self._lock:
            return math.inf if self._limit is None else max(
                0.0, self._limit - (self._ended + sum(self._under_way.values())))

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return not self.left
