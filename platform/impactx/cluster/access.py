"""Who may use the Ray cluster that a job starts for itself: nobody but the job.

Ray runs whatever code it is sent. By default its servers listen on every network address of the
machine, so a cluster without authentication hands the account that started it to everybody who can
reach the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# At 0 every server of Ray binds to loopback, on Linux as well, where several machines are the
# default.
SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", SEVERAL_MACHINES)


@contextlib.contextmanager
def private_cluster() -> Iterator[Path]:
    """Let a Ray cluster that is started in the block listen on loopback and ask for a new token.

    The token is drawn for the block, whatever the environment says of authentication, and lies in
    a file that only this user can read; every process of the cluster finds it by
    RAY_AUTH_TOKEN_PATH. File and variables are gone after the block. A process that is killed
    leaves the file behind, and with it the token of a cluster that has ended.

    Yields:
        The path of the file.
    """
    from ray._private import ray_constants

    variables = {name: os.environ.get(name) for name in _VARIABLES}
    several_machines = ray_constants.ENABLE_RAY_CLUSTER
    folder = Path(tempfile.mkdtemp(prefix="impactx-token-"))  # mode 0700
    token = folder / "token"
    try:
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would be preferred to the file
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
                       SEVERAL_MACHINES: "0"}
        ray_constants.ENABLE_RAY_CLUSTER = False  # Ray reads the variable as it is imported
        read_authentication()
        yield token
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several_machines
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def read_authentication() -> None:
    """Let Ray read mode and token from the environment again; by itself it reads them once."""
    # Compiled, without types.
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
