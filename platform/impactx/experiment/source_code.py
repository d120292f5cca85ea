"""The fingerprint of the code that a model of somebody's own was built by."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType

from torch import nn

_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = Path(sysconfig.get_paths()["stdlib"])


def code_fingerprint(module_name: str, model: nn.Module) -> str:
    """sha256 (hex) of the files of an imported module, of the modules of `model`'s classes, and of what they import.

    Weights do not say what a forward pass does with them: a mean that is written into the code changes the maps, and
    no tensor. The other way to see that would be the scores of a fixed batch. But they differ in their last bits
    between machines, numbers of threads and devices, and rounding moves that trouble only to the numbers near the
    rounding's edge: now and then the same model would be another. Files are the same bytes everywhere. The price is
    that a changed comment makes new maps, which costs time and is never wrong.

    Followed are imports of the user's modules, as far as they are loaded; of installed packages only those of the
    module's own, neither Python's library nor impactx. Not seen is what the code reads besides: a file of numbers, a
    variable of the environment.
    """
    waiting = [module_name, *(kind.__module__ for part in model.modules() for kind in type(part).__mro__)]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        file = Path(getattr(module, "__file__", None) or "")
        if module is None or name in found or not file.is_file() or not _belongs(name, file, module_name):
            continue
        content = file.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        waiting += [name.rpartition(".")[0], *(_imports(content, module) if file.suffix == ".py" else ())]
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _belongs(name: str, file: Path, module_name: str) -> bool:
    package = name.partition(".")[0]
    if package == module_name.partition(".")[0]:
        return True
    return package != "impactx" and not _INSTALLED & set(file.parts) and not file.is_relative_to(_STANDARD)


def _imports(content: bytes, module: ModuleType) -> list[str]:
    """Names that may be modules in the import statements of a module's source."""
    names = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), module.__package__ or module.__name__)
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return names
