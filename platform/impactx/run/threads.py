"""Independent pieces of work, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

GRACE_SECONDS = 15.0  # for threads to end their runs after an interrupt


def run_all(work: Sequence[Callable[[], T]], at_once: int, *, name: str = "work",
            on_interrupt: Callable[[], object] = lambda: None) -> list[T | Exception]:
    """Do everything, `at_once` pieces at a time, and return in order what each returned or raised.

    One piece at a time is done in the calling thread. Ctrl-C (any BaseException that is no
    Exception, in the caller or in a piece) ends it: nothing more is begun, on_interrupt is called,
    threads get a few seconds to end, and it is raised again; threads that do not end are left
    behind, they keep no process alive.
    """
    if at_once <= 1 or len(work) <= 1:
        return [_outcome(piece) for piece in work]
    outcomes: list[T | BaseException | None] = [None] * len(work)
    waiting = list(reversed(range(len(work))))
    lock, interrupted = threading.Lock(), threading.Event()

    def thread() -> None:
        while True:
            with lock:
                if interrupted.is_set() or not waiting:
                    return
                index = waiting.pop()
            try:
                outcomes[index] = _outcome(work[index])
            except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
                outcomes[index] = error
                interrupted.set()

    threads = [threading.Thread(target=thread, name=f"{name}-{k}", daemon=True)
               for k in range(min(at_once, len(work)))]
    try:
        for one in threads:
            one.start()
        while any(one.is_alive() for one in threads) and not interrupted.is_set():
            for one in threads:  # a join without a limit would not let Ctrl-C through
                one.join(0.1)
        for error in outcomes:
            if isinstance(error, BaseException) and not isinstance(error, Exception):
                raise error
    except BaseException:
        interrupted.set()
        on_interrupt()
        for one in threads:
            one.join(GRACE_SECONDS / len(threads))
        raise
    return outcomes  # type: ignore[return-value]


def _outcome(piece: Callable[[], T]) -> T | Exception:
    try:
        return piece()
    except Exception as error:
        return error
