"""jobs/explain.py as a user starts it: a model of theirs, a real Ray cluster of its own, a sheet at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from impactx.explain.reading import store_at

JOB = Path(__file__).resolve().parents[2] / "jobs" / "explain.py"
CODE = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 10))
"""


def test_a_model_of_ones_own_is_explained_by_the_pool(tmp_path):
    pytest.importorskip("captum")
    (tmp_path / "code_of_mine.py").write_text(CODE)
    command = [sys.executable, str(JOB), "--import", "code_of_mine:net", "dataset=digits", "datasets.digits.subset=60",
               "data_root=data", "output=out", "maps.shard_size=20", "cluster.num_cpus=2",
               "cluster.explain_cpu_actors=2"]
    occlusion = ["attribution=occlusion", "attribution.window=16", "attribution.stride=16"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("--sheet", "sheet.png", *occlusion)
    assert done.returncode == 0, done.stderr
    assert "60 maps in 3 shards" in done.stdout and "maps: 60 of 60 maps" in done.stderr
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    address = done.stdout.split("store: ")[1].split()[0]
    assert store_at(address).verify() == []
    again = run(*occlusion)
    assert again.returncode == 0 and "all maps are there already" in again.stderr and "cluster:" not in again.stderr
    failed = run("attribution=grad_cam", "attribution.layer=conv9")
    assert failed.returncode == 2 and "attribution.layer = 'conv9'" in failed.stderr
    assert "convolutions: 0" in failed.stderr
    assert "Traceback" not in failed.stderr
