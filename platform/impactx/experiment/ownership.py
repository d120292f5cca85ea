"""Who may write: of two processes that work on one thing, the one that began last.

After a job was killed, its processes can go on for a while on nodes that nobody reaches, and the
same command, started again, works on the same trainings. Files are whole whoever writes them, but a
checkpoint of one process and a result of the other would not belong together. So whoever begins
leaves a token, and looks whether it still lies there before everything that it writes.
"""

from __future__ import annotations

import os
import socket
import time
import uuid

from impactx.experiment.steps.base import StepError
from impactx.storage import Storage, StorageError


class TakenOver(StepError):
    """Another process works on this now; the message says which, and where."""


class Ownership:
    """The right to write, until another process takes it."""

    def __init__(self, storage: Storage, path: str, what: str) -> None:
        """Take it, from whoever had it.

        Args:
            storage: Where the token is left.
            path: Of the token.
            what: Names the work in messages.
        """
        self._storage, self._path, self._what = storage, path, what
        self._token = uuid.uuid4().hex
        storage.write_json(path, {
            "token": self._token, "host": socket.gethostname(), "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())})

    def check(self) -> None:
        """Check that it is still ours.

        Raises:
            TakenOver: Another process has taken it since.
        """
        try:
            now = self._storage.read_json(self._path)
        except FileNotFoundError:
            raise TakenOver(f"{self._what}: another process has finished it meanwhile") from None
        if not isinstance(now, dict) or now.get("token") != self._token:
            who = now if isinstance(now, dict) else {}
            raise TakenOver(
                f"{self._what}: process {who.get('process')} on {who.get('host')} works on it "
                f"since {who.get('since')} (is the same job running twice?)")

    def release(self) -> None:
        """Give it up; does nothing where another process has taken it."""
        try:
            self.check()
            self._storage.delete(self._path)
        except (TakenOver, StorageError):
            pass
