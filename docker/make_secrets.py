"""Draw the passwords and tokens of a cluster and write them to files.

python docker/make_secrets.py FOLDER
python docker/make_secrets.py --remove FOLDER

Files that exist are kept, because the database keeps the password that it was created with. Nobody
else on this machine can open the folder (mode 0700). The files in it are readable for all, because
the user of the container that they are mounted into has another number than yours.

--remove removes the files that this program wrote, and the folder if nothing else is in it.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

BUCKETS = ("mlflow", "impactx")
WRITTEN = ".written-by-make-secrets"  # a file of the names of all files that were written


def make_secrets(folder: Path) -> list[str]:
    """Write the files that are missing.

    Args:
        folder: The folder, which is created.

    Returns:
        The names of the files that were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    written: list[str] = []

    def write(name: str, text: str) -> str:
        path = folder / name
        if not path.exists():
            path.write_text(text)
            path.chmod(0o444)
            written.append(name)
            with open(folder / WRITTEN, "a") as names:
                names.write(f"{name}\n")
        return path.read_text()

    write("ray_token", secrets.token_hex(32))
    password = write("postgres_password", secrets.token_hex(24))
    write("pgpass", f"*:*:*:mlflow:{password}\n")
    identities = []
    for bucket in BUCKETS:  # each user owns the bucket of its name and sees no other
        keys = write(f"s3_{bucket}", (
            f"[default]\naws_access_key_id = {bucket}-{secrets.token_hex(6)}\n"
            f"aws_secret_access_key = {secrets.token_hex(24)}\n"))
        _, access, secret = (line.rpartition(" ")[2] for line in keys.splitlines())
        identities.append({
            "name": bucket, "credentials": [{"accessKey": access, "secretKey": secret}],
            "actions": [f"{action}:{bucket}" for action in ("Admin", "Read", "Write", "List")]})
    write("s3.json", json.dumps({"identities": identities}, indent=1) + "\n")
    return written


def remove_secrets(folder: Path) -> str:
    """Remove the files that `make_secrets` wrote, and the folder if nothing else is in it.

    Args:
        folder: The folder.

    Returns:
        What was done, for the user.
    """
    if not folder.exists():
        return f"{folder}: no secrets are there"
    if not (folder / WRITTEN).exists():
        return f"{folder} is kept, as make_secrets.py did not write it; remove it yourself"
    for name in [*(folder / WRITTEN).read_text().split(), WRITTEN]:
        (folder / name).unlink(missing_ok=True)
    if others := sorted(path.name for path in folder.iterdir()):
        return f"{folder}: the secrets are removed; kept are {', '.join(others)}"
    folder.rmdir()
    return f"{folder}: removed"


def main() -> None:
    """Write or remove the secrets in the folder that the command line names."""
    match sys.argv[1:]:
        case ["--remove", folder]:
            print(remove_secrets(Path(folder)))
        case [folder] if not folder.startswith("-"):
            names = make_secrets(Path(folder))
            print(f"{folder}:", f"made {', '.join(names)}" if names else "all secrets are there")
        case _:
            sys.exit("usage: python docker/make_secrets.py [--remove] FOLDER")


if __name__ == "__main__":
    main()
