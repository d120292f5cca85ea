"""jobs/explain.py as a user starts it: a model of theirs, a real Ray cluster of its own, a sheet at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lab import descendants, gone, until

from impactx.approaches.checkpoint import save_checkpoint
from impactx.configuration import load_settings
from impactx.datasets import load_dataset
from impactx.explain.maps.reading import store_at
from impactx.explain.methods.partition import Partition
from impactx.models import build_classifier
from impactx.settings import ModelSettings

LENET = ModelSettings(name="lenet5", architecture="lenet5")
JOB = Path(__file__).resolve().parents[2] / "jobs" / "explain.py"
STARTED: list[subprocess.Popen] = []
CODE = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 10))
"""


def start(folder: Path, *arguments: str, **how) -> subprocess.Popen:
    """The job's process, in a folder, with a cluster of its own."""
    command = [sys.executable, str(JOB), *arguments, "dataset=digits", "data_root=data", "output=out",
               "cluster.num_cpus=2", "resources.workers=2"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    STARTED.append(subprocess.Popen(command, cwd=folder, env=environment, text=True,
                                    **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how)))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """A test that fails leaves no job behind."""
    yield
    for job in STARTED:
        if job.poll() is None:
            job.kill()
    STARTED.clear()


@pytest.mark.slow
def test_a_killed_driver_loses_nothing_and_repeats_nothing(tmp_path):
    """kill -9 of the job in the middle; started again, it makes the rest, and the same maps as one process."""
    model = build_classifier(LENET, 10, (32, 32), seed=0)
    (tmp_path / "net.pt").write_bytes(save_checkpoint(model, model_settings=LENET, class_names=list("0123456789")))
    arguments = ("--model", "net.pt", "datasets.digits.subset=400", "maps.shard_size=10", "attribution=partition",
                 "attribution.batch_size=10")
    with open(tmp_path / "log", "w") as log:  # a pipe would be held open by Ray's processes, which live on a little
        job = start(tmp_path, *arguments, stdout=log, stderr=log)
    written = until(lambda: list(tmp_path.glob("out/maps/*/shard-*.parquet")), "the first shard")
    below = descendants(job.pid)
    job.kill()
    job.wait()
    until(lambda: gone(below), "the end of every process of the killed job")
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/maps/*/shard-*.parquet")}
    assert set(written) <= set(there) and len(there) < 40, "nothing was left to do"
    job = start(tmp_path, *arguments)
    _, said = job.communicate()
    assert job.returncode == 0, said
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
    store = store_at(str(written[0].parent))
    assert store.verify() == []
    digits = load_settings(overrides=["dataset=digits", "model=lenet5", "datasets.digits.subset=400"])
    data = load_dataset(digits.datasets["digits"], tmp_path / "data")
    expected = Partition(batch_size=10)
    for shard in (0, store.spec.shards // 2, store.spec.shards - 1):
        rows = store.shard_indices(shard)
        maps = expected.explain(model.eval(), data.train.images[rows], data.train.labels[rows], indices=rows).maps
        found = store.read_shard(shard)["map"].combine_chunks().flatten().to_numpy()
        np.testing.assert_array_equal(found, maps.ravel())


def test_a_model_of_ones_own_is_explained_by_the_pool(tmp_path):
    pytest.importorskip("captum")
    (tmp_path / "code_of_mine.py").write_text(CODE)
    occlusion = ["attribution=occlusion", "attribution.window=16", "attribution.stride=16"]

    def run(*more: str) -> subprocess.CompletedProcess:
        job = start(tmp_path, "--import", "code_of_mine:net", "datasets.digits.subset=60", "maps.shard_size=20", *more)
        said = job.communicate()
        return subprocess.CompletedProcess(job.args, job.returncode, *said)

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
