"""The code and the machine that computed a result, for its record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from impactx import __version__

if TYPE_CHECKING:
    import torch

# Packages that results may depend on, beside this one.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "pyarrow", "shap", "captum", "ray",
            "mlflow")


class Environment(BaseModel):
    """What changes numbers and no key: where, and with which libraries, a result was computed.

    Attributes:
        device: The processor or GPU by its name.
        precision: Of forward passes, as it was in force: float32, float64, bfloat16 (autocast),
            tf32, or "float32 with tf32 convolutions", which is torch's float32 on recent GPUs.
        compiled: Whether torch.compile compiled the step.
        workers: Processes that shared the work.
        threads: Of torch, in each of them.
        versions: Of this package, of Python and of the libraries that results may depend on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    precision: str
    compiled: bool
    workers: int
    threads: int
    versions: dict[str, str]


def environment(device: torch.device | str, precision: str, *, workers: int = 1,
                compiled: bool = False, exact: bool = False) -> Environment:
    """Return the environment of a computation in this process.

    Args:
        device: On which models run.
        precision: That was asked for: float32, float64, bfloat16 or tf32.
        workers: Processes that share the work.
        compiled: Whether torch.compile compiles the step.
        exact: Whether float32 is kept in convolutions as well; see `explain.precision`.
    """
    import torch

    place = torch.device(device)
    cuda = place.type == "cuda"
    has_tf32 = cuda and torch.cuda.get_device_capability(place) >= (8, 0)
    cudnn: Any = torch.backends.cudnn  # its stubs lack conv
    if precision == "tf32" and not has_tf32:
        precision = "float32"
    elif precision == "float32" and has_tf32 and not exact and (
            cudnn.conv.fp32_precision == "tf32"):
        precision = "float32 with tf32 convolutions"
    return Environment(
        device=torch.cuda.get_device_name(place) if cuda else _processor(), precision=precision,
        compiled=compiled, workers=workers, threads=torch.get_num_threads(),
        versions={"impactx": __version__} | package_versions())


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


@cache
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


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip()
                    for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        return platform.processor() or platform.machine()
