"""Who holds what of the cluster: one queue for the trials, trainings and maps of all cells of a job.

Ray places work on nodes, first come first served. Several searches, trainings and pools at once would then get what
they happen to ask for first, and a search that is long holds everything until it is over. So whatever is started
asks here first. A freed part of the cluster goes to the owner (a cell) whose dominant share is the smallest: the
largest of its shares of the CPUs, the GPUs and the trials (Ghodsi et al. 2011, dominant resource fairness). What
one owner does not want, the others get.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Amounts = Mapping[str, float]  # kind ("CPU", "GPU", "trials") -> how much
POLL_SECONDS = 1.0
CLOSE_SECONDS = 5.0  # how long those who ask again and again have to notice that it is over
EPSILON = 1e-6


class Closed(RuntimeError):
    """The job is over or was interrupted: nothing is given any more."""

    def __init__(self) -> None:
        super().__init__("the job has left its cluster")


@dataclass(frozen=True)
class _Wish:
    owner: str
    need: Amounts
    since: int


class Shares:
    """What each owner holds, and what it waits for. Used by many threads."""

    def __init__(self, capacity: Callable[[], Amounts]) -> None:
        """capacity: asked each time, so a cluster may grow and shrink; a kind that is absent has no limit."""
        self._capacity = capacity
        self._held: dict[str, dict[str, float]] = {}
        self._wishes: dict[tuple[str, str], _Wish] = {}
        self._count = 0
        self._asking = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, owner: str, key: str, need: Amounts) -> bool:
        """Take `need` now if it is the owner's turn. If not, the wish is kept under (owner, key) until it is taken
        or forgotten: it counts when others ask. Raises Closed.
        """
        with self._changed:
            self.check()
            wish = self._wishes.get((owner, key))
            self._count += 1
            wish = _Wish(owner, dict(need), wish.since if wish else self._count)
            self._wishes[owner, key] = wish
            if not self._granted(wish):
                return False
            del self._wishes[owner, key]
            held = self._held.setdefault(owner, {})
            for kind, amount in need.items():
                held[kind] = held.get(kind, 0.0) + amount
            return True

    def wait(self, owner: str, key: str, need: Amounts) -> None:
        """Take `need`, waiting for the owner's turn. Raises Closed."""
        with self._changed:
            while not self.take(owner, key, need):
                self._changed.wait(POLL_SECONDS)

    def forget(self, owner: str, key: str) -> None:
        """The wish is no longer there."""
        with self._changed:
            if self._wishes.pop((owner, key), None):
                self._changed.notify_all()

    def give(self, owner: str, amounts: Amounts) -> None:
        """Give back what was taken."""
        with self._changed:
            held = self._held[owner]
            for kind, amount in amounts.items():
                held[kind] -= amount
            self._changed.notify_all()

    def should_give(self, owner: str, part: Amounts) -> bool:
        """Whether somebody who waits would still hold less than the owner after it got this part of the owner's."""
        with self._changed:
            capacity = self._capacity()
            left = self._share(owner, capacity, {kind: -amount for kind, amount in part.items()})
            return any(wish.owner != owner and set(wish.need) & set(part)
                       and not self._fits(wish.need, capacity, {})
                       and self._share(wish.owner, capacity, part) <= left + EPSILON
                       for wish in self._wishes.values())

    def shared_by(self, owner: str) -> bool:
        """Whether another than this owner has asked for something so far."""
        with self._changed:
            return bool({*self._held, *(wish.owner for wish in self._wishes.values())} - {owner})

    def check(self) -> None:
        """Raises Closed once nothing is given any more."""
        if self._closed:
            raise Closed

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """For a thread that asks Ray again and again, and `check`s before it does: `close` waits until it is out.

        Ray ends the whole process, with status 1, where a thread calls it while another one leaves the cluster.
        """
        with self._changed:
            self.check()
            self._asking += 1
        try:
            yield
        finally:
            with self._changed:
                self._asking -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Nothing is given from now on, and whoever waits gets Closed; returns when nobody is `asking`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._asking, CLOSE_SECONDS)

    def _share(self, owner: str, capacity: Amounts, more: Amounts | None = None) -> float:
        held, more = self._held.get(owner, {}), more or {}
        return max((max(held.get(kind, 0.0) + more.get(kind, 0.0), 0.0) / capacity[kind]
                    for kind in {*held, *more} if capacity.get(kind)), default=0.0)

    def _fits(self, need: Amounts, capacity: Amounts, reserved: Amounts) -> bool:
        used: dict[str, float] = dict(reserved)
        for held in self._held.values():
            for kind, amount in held.items():
                used[kind] = used.get(kind, 0.0) + amount
        if all(amount < EPSILON for amount in used.values()):
            return True  # more than there is: Ray waits for a node that has it
        return all(kind not in capacity or amount + used.get(kind, 0.0) <= capacity[kind] + EPSILON
                   for kind, amount in need.items())

    def _granted(self, wish: _Wish) -> bool:
        """Whether it fits beside what is held, and beside what poorer owners wait for."""
        capacity = self._capacity()
        mine = (self._share(wish.owner, capacity), wish.since)
        reserved: dict[str, float] = {}
        for other in self._wishes.values():
            if other is not wish and (self._share(other.owner, capacity), other.since) < mine:
                for kind, amount in other.need.items():
                    reserved[kind] = reserved.get(kind, 0.0) + amount
        return self._fits(wish.need, capacity, reserved)
