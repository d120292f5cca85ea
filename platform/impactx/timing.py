"""Progress of long work: how much of it is done, how fast, and the time that is left."""

from __future__ import annotations

import logging
import time

log = logging.getLogger("impactx")


def duration(seconds: float) -> str:
    """Return seconds as people say them: "8.3 s", "4 min 05 s", "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Logs lines such as `stage 1: 3 of 12 trials, 40.1 s left: <detail>`.

    Create it when the work starts: the rate is counted from there.

    Args:
        what: Names the work, at the beginning of each line.
        things: What is counted, in the plural.
        total: The number of things of the whole work.
        before: The number of things that were done earlier; they are left out of the rate.
        every: The least seconds between two lines; 0 logs one for each step. The last step is
            always logged.
    """

    def __init__(self, what: str, things: str, total: int = 0, *, before: int = 0,
                 every: float = 0) -> None:
        self.what, self.things, self.total, self.every = what, things, total, every
        self._before = self._done = before
        self._started = time.perf_counter()
        self._printed = float("-inf")

    def step(self, detail: str = "") -> None:
        """Count one more thing as done.

        Args:
            detail: The end of the line.
        """
        self.at(self._done + 1, detail)

    def at(self, done: int, detail: str = "", *, before: int | None = None,
           total: int | None = None) -> None:
        """Set the number of things that are done.

        Args:
            done: The number, those that were done earlier included.
            detail: The end of the line.
            before: As for the class, for work that learns it only now.
            total: As for the class, for work that learns it only now.
        """
        self._done = done
        self._before = self._before if before is None else before
        self.total = self.total if total is None else total
        now = time.perf_counter()
        if now - self._printed < self.every and done < self.total:
            return
        self._printed = now
        new, elapsed = done - self._before, now - self._started
        rate = new / elapsed if elapsed > 0 else 0.0
        left = duration((self.total - done) / rate) if rate > 0 else "unknown time"
        speed = f", {rate:.1f} {self.things}/s" if rate >= 1 else ""
        log.info("%s: %d of %d %s%s, %s left%s", self.what, done, self.total, self.things, speed,
                 left, f": {detail}" if detail else "")
