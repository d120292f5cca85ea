"""Which code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

from impactx import __version__


def code_version() -> str:
    """The package's version, with the commit (and `+changes`) where it runs from a git checkout or an image."""
    here = Path(__file__).resolve().parent
    if (built := here / "REVISION").is_file():  # docker/Dockerfile writes it
        return f"{__version__}+g{built.read_text(encoding='utf8').strip()}"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here))
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{commit}{'+changes' if changed else ''}"
