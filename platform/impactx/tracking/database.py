"""MLflow's SQLite file, which is created whole or not at all.

MLflow creates its tables by a long series of migrations. A process that is killed among them leaves
a file that no later start can use ("table _alembic_tmp_experiments already exists", "duplicate
column name"), and two processes that migrate one fresh file break it as well. So the file is
created under another name in the same folder, by one process at a time, and gets its own name when
it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from impactx.tracking.client import quiet_mlflow

CREATING = ".creating-"  # begins the name of a file that is not complete
JOURNALS = ("-journal", "-wal", "-shm")  # SQLite's own files beside a database that is open


@contextlib.contextmanager
def locked_database(path: Path) -> Iterator[None]:
    """Hold the lock of MLflow's SQLite file, and create the file before the block if there is none.

    The lock is the kernel's, on a file beside the database: it ends with the process that holds
    it, however that dies. SQLite relies on the kernel's locks as well.

    Args:
        path: The database's file. Missing folders are created.
    """
    path = path.resolve()  # a rename would replace a link to a file that is not there yet
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only holders of the lock create, so whoever left such a file is dead.
        _remove_incomplete(path)
        if not path.exists():
            _create(path)
        yield


def _create(path: Path) -> None:
    temporary = path.with_name(f"{CREATING}{uuid.uuid4().hex}-{path.name}")
    try:
        _initialise(temporary)
        _sync(temporary)
        if not path.exists():  # a program that knows nothing of the lock may have been faster
            temporary.rename(path)
    finally:
        _remove_incomplete(path)
    _sync(path.parent)


def _initialise(path: Path) -> None:
    """Let MLflow create its tables and its default experiment, and close all of its connections."""
    quiet_mlflow()
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # The same folder for artifacts as MlflowClient gives: that of the default experiment, which is
    # not used here.
    store = SqlAlchemyStore(  # type: ignore[no-untyped-call]
        f"sqlite:///{path}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)
    store.engine.dispose()
    left = [name for suffix in JOURNALS if os.path.exists(name := f"{path}{suffix}")]
    if left:  # they hold changes that would be lost with their name
        raise RuntimeError(f"a connection to the new database is still open: {', '.join(left)}")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_incomplete(path: Path) -> None:
    """Remove the files of creations of this database that did not come to their end."""
    pattern = re.compile(f"{re.escape(CREATING)}[0-9a-f]{{32}}-{re.escape(path.name)}"
                         f"({'|'.join(JOURNALS)})?")
    for name in os.listdir(path.parent):
        if pattern.fullmatch(name):
            (path.parent / name).unlink(missing_ok=True)
