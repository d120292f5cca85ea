"""The house keeps its rooms: who may import what, and that the method runs without Ray and MLflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "impactx"
# Arrows point down this list only.
LAYERS = [
    {"cli"},
    {"prediction", "serving"},
    {"api"},
    {"benchmarks"},
    {"cluster"},
    {"tracking", "report", "costs"},
    {"run"},
    {"results"},
    {"experiment"},
    {"approaches"},
    {"configuration", "settings_doc"},
    {"plugins"},
    {"training", "explain", "evaluation"},
    {"models", "datasets"},
    {"code", "fetching"},
    {"settings", "storage", "timing", "version"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
# Between rooms of one row; these arrows are meant.
BESIDE = {("evaluation", "explain")}


def files():
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def room(path):
    """The top-level module or folder of impactx that a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path):
    """Full names of everything that a file imports anywhere in it, lazily or not: (name, line)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # level dots: the package of this file, and level - 1 above it
            above = path.relative_to(PACKAGE.parent).parts[:-node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def test_platform_is_no_package():
    assert (ROOT / "platform").is_dir()
    assert not (ROOT / "platform" / "__init__.py").exists(), "it would shadow the standard library's `platform`"


@pytest.mark.parametrize(("library", "home"), [("ray", "cluster"), ("mlflow", "tracking")])
def test_a_library_lives_in_one_room(library, home):
    found = {path.relative_to(PACKAGE).as_posix() for path in files()
             for name, _ in imports(path) if name.partition(".")[0] == library}
    assert found, f"nobody imports {library}: this test looks in the wrong place"
    assert {Path(name).parts[0].removesuffix(".py") for name in found} == {home}


def test_every_room_has_a_place():
    assert {room(path) for path in files()} - {""} <= RANK.keys(), "say in LAYERS where a new room belongs"


def test_arrows_point_one_way():
    wrong, seen, used = [], 0, set()
    for path in files():
        here = room(path)
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] != "impactx" or len(parts) < 2 or not here:
                continue
            there = parts[1]
            if there == here or there not in RANK:
                continue
            seen += 1
            if (here, there) in BESIDE:
                used.add((here, there))
            elif RANK[there] <= RANK[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} -> {there}")
    assert seen > 50
    assert not wrong, "\n".join(wrong)
    assert used == BESIDE, "an arrow that nobody needs any more"
    assert RANK.keys() == {room(path) for path in files()} - {""}, "a place of a room that is gone"


def test_jobs_hold_no_logic():
    """A job's file parses, checks, connects and calls: no classes, no loops over anything but what it prints."""
    jobs = sorted((ROOT / "jobs").glob("*.py"))
    assert jobs
    for path in jobs:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf8"))))
        assert not [n.lineno for n in nodes if isinstance(n, (ast.ClassDef, ast.While))], path


def test_the_method_runs_without_ray_and_mlflow():
    """Every module but cluster's and tracking's own opens with both libraries blocked."""
    modules = [path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
               for path in files() if room(path) not in ("cluster", "benchmarks")]
    assert {"impactx", "impactx.tracking", "impactx.run.job", "impactx.cli.main"} <= set(modules)
    program = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "mlflow"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
for module in {modules!r} + ["impactx.cluster.connection"]:
    importlib.import_module(module)
try:
    import ray
except ImportError:
    print("all without ray")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
                          env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin", "HOME": "/tmp"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all without ray"
