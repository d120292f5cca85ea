"""Write the lists of packages that the image's layers install, from pyproject.toml and constraints.txt here.

torch.txt holds torch and what only torch needs, torch-cpu.txt the same without CUDA, requirements.txt the rest. A layer
is built again only when its own list changes, so new code, or a new version of another package, does not fetch
torch's gigabytes again.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("cluster", "explain", "server")
TORCH = ("torch", "torchvision")
CUDA = ("cuda-", "nvidia-", "triton")


def lists(project: str, constraints: str) -> dict[str, list[str]]:
    """The lines of each list by its file's name, from the texts of pyproject.toml and constraints.txt."""
    described = tomllib.loads(project)["project"]
    wanted = described["dependencies"] + [r for extra in EXTRAS for r in described["optional-dependencies"][extra]]
    pins = [line.strip() for line in constraints.splitlines() if re.match(r"[\w.-]+==", line)]
    own = [pin for pin in pins if pin.partition("==")[0] in TORCH]
    return {"torch.txt": own + [pin for pin in pins if pin.startswith(CUDA)], "torch-cpu.txt": own,
            "requirements.txt": [r for r in wanted if re.split(r"[\W]", r)[0] not in TORCH]}


if __name__ == "__main__":
    for name, lines in lists(Path("pyproject.toml").read_text(), Path("constraints.txt").read_text()).items():
        Path(name).write_text("\n".join(lines) + "\n")
