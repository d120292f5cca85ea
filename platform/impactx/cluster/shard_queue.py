"""Which worker makes which shard of maps, in a queue common to all pools: what is lost with a worker, or late."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from impactx.experiment.units import WorkError

WAIT = -1


class ShardQueue:
    """Which shard is whose. Lives in the cluster, as an actor, as long as the pools do."""

    def __init__(self, shards: Sequence[int], max_failures: int,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting = list(reversed(shards))
        self._max_failures = max_failures
        self._of_ticket: dict[str, int] = {}
        self._taken: dict[int, tuple[float, int]] = {}  # shard -> (when it was last taken, by how many)
        self._deaths: dict[int, int] = {}
        self._seconds: list[float] = []
        self._maps = 0
        self._error: Exception | None = None
        self._leaving: set[str] = set()

    def leave(self, pool: str) -> None:
        """Tickets whose name begins with this get no further shard: others need their part of the cluster."""
        self._leaving.add(pool)

    def take(self, ticket: str) -> int | None:
        """The next shard of this ticket; WAIT: ask again; None: nothing is left to do.

        A ticket that did not bring its last shard back lost its process: it gets the same one again. Ray restarts
        dead actors without end, so a shard that kills its worker each time is given up here, by name.
        """
        if self._error is not None:
            return None
        held = self._of_ticket.get(ticket)
        if held in self._taken:
            self._deaths[held] = self._deaths.get(held, 0) + 1
            if self._deaths[held] > self._max_failures:
                self.fail(WorkError(f"shard {held}: its worker died {self._deaths[held]} times (out of memory? "
                                    "cluster.explain_memory_mb bounds an actor's batches)"))
                return None
            return held
        if ticket.rpartition("-")[0] in self._leaving:
            return None
        shard = self._waiting.pop() if self._waiting else self._late()
        if shard is None:
            return WAIT if self._taken else None
        self._of_ticket[ticket] = shard
        self._taken[shard] = (self._clock(), self._taken.get(shard, (0, 0))[1] + 1)
        return shard

    def _late(self) -> int | None:
        """The shard that has been out longest, where it has been out longer than a quick worker needs for it."""
        if not self._seconds:
            return None
        usual = sorted(self._seconds)[len(self._seconds) // 4]
        now = self._clock()
        late = [(when, shard) for shard, (when, holders) in self._taken.items()
                if holders < 3 and now - when > 1.5 * usual]
        return min(late)[1] if late else None

    def done(self, ticket: str, shard: int, maps: int, seconds: float) -> None:
        """A shard was written."""
        self._of_ticket.pop(ticket, None)
        if self._taken.pop(shard, None) is not None:
            self._maps += maps
            self._seconds.append(seconds)

    def fail(self, error: Exception) -> None:
        """Stop: nothing more is handed out. The first error counts."""
        self._error = self._error or error

    def waiting(self) -> int:
        """How many shards nobody works on."""
        return len(self._waiting)

    def worked(self) -> tuple[int, float]:
        """Maps made, and the seconds that processes needed for them, added up."""
        return self._maps, sum(self._seconds)

    def state(self) -> tuple[int, bool, Exception | None]:
        """Maps made; whether every shard is there; what went wrong."""
        return self._maps, not self._waiting and not self._taken, self._error
