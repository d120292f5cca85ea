"""Write the lists of packages that the layers of the image install.

They are made from pyproject.toml and constraints.txt in the working directory. torch.txt holds
torch and the packages that only torch needs, torch-cpu.txt the same without CUDA, requirements.txt
all others. A layer is built again only if its own list changes, so that new code, or a new version
of another package, does not download torch's gigabytes again.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("cluster", "explain", "server")
TORCH = ("torch", "torchvision")
CUDA = ("cuda-", "nvidia-", "triton")


def lists(project: str, constraints: str) -> dict[str, list[str]]:
    """Return the lines of each list.

    Args:
        project: The text of pyproject.toml.
        constraints: The text of constraints.txt.

    Returns:
        The lines by the name of the list's file.
    """
    metadata = tomllib.loads(project)["project"]
    extras = [line for extra in EXTRAS for line in metadata["optional-dependencies"][extra]]
    requirements = metadata["dependencies"] + extras
    pins = [line.strip() for line in constraints.splitlines() if re.match(r"[\w.-]+==", line)]
    torch = [pin for pin in pins if pin.partition("==")[0] in TORCH]
    return {"torch.txt": torch + [pin for pin in pins if pin.startswith(CUDA)],
            "torch-cpu.txt": torch,
            "requirements.txt": [line for line in requirements
                                 if re.split(r"[\W]", line)[0] not in TORCH]}


if __name__ == "__main__":
    texts = Path("pyproject.toml").read_text(), Path("constraints.txt").read_text()
    for name, lines in lists(*texts).items():
        Path(name).write_text("\n".join(lines) + "\n")
