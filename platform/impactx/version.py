"""The code and the machine that computed a result, as texts for its record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from impactx import __version__

# Packages that results may depend on, beside this one.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "pyarrow", "shap", "captum", "ray",
            "mlflow")


def code_version() -> str:
    """Return the version of this package, such as "1.2.0+g0123456789ab+changes".

    The commit is part of it where the package runs from a git checkout or an image, and "+changes"
    where files of the package differ from that commit.
    """
    here = Path(__file__).resolve().parent
    if (built := here / "REVISION").is_file():  # docker/Dockerfile writes it
        return f"{__version__}+g{built.read_text(encoding='utf8').strip()}"
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", str(here))
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{commit}{'+changes' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True,
                          check=True, timeout=10)
    return done.stdout.strip()


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results may depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> str:
    """Return this machine in a few words: processors, memory (GiB), and the names of its GPUs."""
    parts = [f"{os.cpu_count()} × {_processor()}"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        parts.append(f"{size / 2**30:.0f} GiB")
    import torch

    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return ", ".join([*parts, *(gpus or ["no GPU"])])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip()
                    for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        return platform.processor() or platform.machine()
