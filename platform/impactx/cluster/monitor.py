"""What the workers of a training by Ray Train tell the job.

The actor starts fast, because this module imports nothing else.
"""

from __future__ import annotations

import ray


@ray.remote(num_cpus=0)
class Monitor:
    """Collects what a training's workers report: their epochs, and an error that ends it."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._error: Exception | None = None

    def epoch(self, row: dict[str, float]) -> None:
        """Note the metrics of an epoch."""
        self._rows.append(row)

    def fail(self, error: Exception) -> None:
        """Note that a worker gave up. The first error counts."""
        self._error = self._error or error

    def since(self, count: int) -> tuple[list[dict[str, float]], Exception | None]:
        """Return the epochs after the first `count`, and the error."""
        return self._rows[count:], self._error
