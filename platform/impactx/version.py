"""Which code made a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
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


# What results may depend on, beside this package.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "pyarrow", "shap", "captum", "ray", "mlflow")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """This machine in a few words: processors, memory, GPUs."""
    parts = [f"{os.cpu_count()} × {_processor()}"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB")
    import torch

    parts += [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] or ["no GPU"]
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that does not say its name
        return platform.processor() or platform.machine()
