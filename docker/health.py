"""Check the health of the Ray node in this container.

It exits with status 0 and prints the answer of Ray's own agent, or with status 1 and the reason.
"""

from __future__ import annotations

import os
import sys
import urllib.request
from pathlib import Path

AGENT = "http://127.0.0.1:52365/api/healthz"


def main() -> None:
    """Ask the node's agent, with the cluster's token if it has one."""
    request = urllib.request.Request(os.environ.get("RAY_AGENT_HEALTH", AGENT))
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token or path:
        token = token or Path(str(path)).read_text().strip()
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=8) as answer:
            print(answer.read().decode())
    except OSError as error:
        sys.exit(f"unhealthy: {error}")


if __name__ == "__main__":
    main()
