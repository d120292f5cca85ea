"""Who may write: of two processes that work on one thing, the last to come.

After a job was killed, its processes can go on for a while, on nodes that nobody reaches; the same command started
again works on the same trainings. Files are whole whoever writes them, but a checkpoint of one and a result of the
other would not belong together. So whoever begins leaves a token, and looks whether it still lies there before
everything that it writes.
"""

from __future__ import annotations

import os
import socket
import time
import uuid

from impactx.experiment.units import WorkError
from impactx.storage import Storage, StorageError


class TakenOver(WorkError):
    """Another process works on this now; the message says which, and where."""


class Claim:
    """The right to write, until another process claims it. `what` names the work in messages."""

    def __init__(self, storage: Storage, path: str, what: str) -> None:
        """Claim it, from whoever had it."""
        self._storage, self._path, self._what = storage, path, what
        self._token = uuid.uuid4().hex
        storage.write_json(path, {"token": self._token, "host": socket.gethostname(), "process": os.getpid(),
                                  "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())})

    def check(self) -> None:
        """Raise TakenOver where another process has claimed it since."""
        try:
            now = self._storage.read_json(self._path)
        except FileNotFoundError:
            raise TakenOver(f"{self._what}: another process has finished it meanwhile") from None
        if not isinstance(now, dict) or now.get("token") != self._token:
            who = now if isinstance(now, dict) else {}
            raise TakenOver(
                f"{self._what}: process {who.get('process')} on {who.get('host')} works on it since {who.get('since')} "
                "(is the same job running twice?)")

    def release(self) -> None:
        """Nobody works on it any more. Does nothing where another process has claimed it."""
        try:
            self.check()
            self._storage.delete(self._path)
        except (TakenOver, StorageError):
            pass
