"""Addresses of the tracking store, and keeping their passwords out of every text."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

SQLITE_DEFAULT = "mlflow.db"  # in the output folder


def addresses(uri: str | None, output: str) -> tuple[str, str | None]:
    """The tracking address, and where its artifacts go (None: the server knows)."""
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
    return f"sqlite:///{path}{''.join(uri.partition('?')[1:])}", (path.parent / "mlartifacts").as_uri()


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a sqlite:/// address's file; None for any other address."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def redact(text: str, uri: str = "") -> str:
    """The text without the passwords of addresses in it, nor the one of `uri` wherever it stands."""
    secret = urlsplit(uri).password or ""
    for form in {secret, unquote(secret)}:
        if len(form) > 3:
            text = text.replace(form, "***")
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"(?i)\b((?:password|passwd|token|secret)=)[^&\s]+", r"\1***", text)
