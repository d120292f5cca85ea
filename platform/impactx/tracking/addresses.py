"""Addresses of the tracking store, and keeping their passwords out of every text."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

SQLITE_DEFAULT = "mlflow.db"  # in the output folder


def addresses(uri: str | None, output: str) -> tuple[str, str | None]:
    """Return the address of the tracking store and the one of its artifacts.

    Args:
        uri: The address that the user gave; None for a SQLite file in the output folder, or in the
            working directory if the output is in a bucket.
        output: The job's output, a folder or an address such as s3://bucket/prefix.

    Returns:
        The tracking address, in which a SQLite file's path is absolute, and the address under which
        artifacts are stored (None: the server decides).
    """
    remote = "://" in output
    if not uri:
        folder = Path.cwd() if remote else Path(output).expanduser().absolute()
        uri = f"sqlite:///{folder / SQLITE_DEFAULT}"
        if remote:
            return uri, f"{output.rstrip('/')}/mlartifacts"
    path = sqlite_path(uri)
    if path is None:
        return uri, None
    # A relative path would be another file in each worker.
    query = "".join(uri.partition("?")[1:])
    return f"sqlite:///{path}{query}", (path.parent / "mlartifacts").as_uri()


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite:/// address's file; None for any other address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def redact(text: str, uri: str = "") -> str:
    """Return a text with *** in the place of every password and token.

    Args:
        text: A message, a traceback, a command line.
        uri: An address whose password is replaced wherever it stands, not only within addresses.
    """
    secret = urlsplit(uri).password or ""
    for form in {secret, unquote(secret)}:
        if len(form) > 3:
            text = text.replace(form, "***")
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"(?i)\b((?:password|passwd|token|secret)=)[^&\s]+", r"\1***", text)
