"""Make the passwords and tokens of a cluster, each drawn anew, as files: python docker/make_secrets.py FOLDER

What is there already stays: the database keeps the password that it was made with. The folder is closed to everybody
else on this machine (mode 0700). The files in it can be read by whom they are mounted for: a container's user has
another number than yours.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

BUCKETS = ("mlflow", "impactx")


def make_secrets(folder: Path) -> list[str]:
    """Write the files that are missing; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    made: list[str] = []

    def write(name: str, text: str) -> str:
        path = folder / name
        if not path.exists():
            path.write_text(text)
            path.chmod(0o444)
            made.append(name)
        return path.read_text()

    write("ray_token", secrets.token_hex(32))
    password = write("postgres_password", secrets.token_hex(24))
    write("pgpass", f"*:*:*:mlflow:{password}\n")
    identities = []
    for bucket in BUCKETS:  # each user owns the bucket of its name and sees no other
        keys = write(f"s3_{bucket}", f"[default]\naws_access_key_id = {bucket}-{secrets.token_hex(6)}\n"
                                     f"aws_secret_access_key = {secrets.token_hex(24)}\n")
        _, access, secret = (line.rpartition(" ")[2] for line in keys.splitlines())
        identities.append({"name": bucket, "credentials": [{"accessKey": access, "secretKey": secret}],
                           "actions": [f"{action}:{bucket}" for action in ("Admin", "Read", "Write", "List")]})
    write("s3.json", json.dumps({"identities": identities}, indent=1) + "\n")
    return made


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docker/make_secrets.py FOLDER")
    names = make_secrets(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: " + (f"made {', '.join(names)}" if names else "all secrets are there"))
