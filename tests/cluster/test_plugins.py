"""Plugins on the processes of a cluster: found there, running there, and one message where they cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLATFORM = Path(__file__).resolve().parents[2] / "platform"
PLUGIN = """
from typing import Literal
from impactx.settings.extensions import MapMetricSettings, map_metric
from helper_of_mine.inner import FACTOR
import second_helper_of_mine

@map_metric
class Toy(MapMetricSettings):
    metric: Literal["toy_of_mine"] = "toy_of_mine"
    factor: float = FACTOR

    def of(self, value: float) -> float:
        return self.factor * second_helper_of_mine.twice(value)
"""
# A driver of its own: the folder of the plugin is gone before any work begins.
DRIVER = """
import sys
from pathlib import Path
from impactx.cluster.connection import connected
from impactx.settings import ClusterSettings
from impactx.settings.extensions import map_metric

folder, address = Path(sys.argv[1]), sys.argv[2] or None

def work(described, toy):
    import os
    from impactx.settings.extensions import map_metric
    import metric_of_mine
    read = map_metric.parse(described)
    assert read == toy and type(toy) is metric_of_mine.Toy
    return toy.of(5), type(toy)(factor=2), os.environ["IMPACTX_PLUGINS"], metric_of_mine.__file__

try:
    with connected(ClusterSettings(address=address, num_cpus=1), {}, [str(folder / "metric_of_mine.py")]):
        import ray
        folder.rename(folder.with_name("gone"))
        toy = map_metric.parse({"metric": "toy_of_mine"})
        value, other, names, file = ray.get(ray.remote(work).remote({"metric": "toy_of_mine"}, toy))
        assert Path(file).parent != folder and other.of(1) == 4
        print("answer", value, names)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "plugins"
    (folder / "helper_of_mine").mkdir(parents=True)
    (folder / "metric_of_mine.py").write_text(PLUGIN)
    (folder / "helper_of_mine" / "__init__.py").write_text("")
    (folder / "helper_of_mine" / "inner.py").write_text("FACTOR = 3.0\n")
    (folder / "second_helper_of_mine.py").write_text("def twice(x): return 2 * x\n")
    (folder / "random.py").write_text("raise RuntimeError('a file of mine hides a module of Python')\n")
    return folder


def drive(folder: Path, address: str) -> str:
    done = subprocess.run([sys.executable, "-c", DRIVER, str(folder), address], cwd="/", text=True,
                          capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(PLATFORM)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_cluster_that_is_running_already(cluster, folder):
    assert drive(folder, cluster.address) == "answer 30.0 metric_of_mine"


def test_a_cluster_of_the_jobs_own(folder):
    assert drive(folder, "") == "answer 30.0 metric_of_mine"


def test_what_a_node_lacks_is_one_message_before_anything_starts(cluster, folder):
    (folder / "second_helper_of_mine.py").write_text(
        "import os\nif 'IMPACTX_PLUGINS' in os.environ: import only_on_the_machine_of_the_job\n"
        "def twice(x): return 2 * x\n")
    message = drive(folder, cluster.address)
    assert message.startswith("ClusterError: on node ") and "the plugin metric_of_mine cannot be imported" in message
    assert "No module named 'only_on_the_machine_of_the_job'" in message


def test_other_code_on_a_node_is_noticed(cluster):
    import dataclasses

    import ray

    from impactx import plugins
    from impactx.cluster.capacity import ClusterError
    from impactx.cluster.reach import check_plugins

    plugin = plugins.Plugin("impactx.explain.masking", (), None, ("impactx.explain.masking",),
                            plugins.code_fingerprint(["impactx.explain.masking"]).digest)
    check_plugins([plugin], ray.nodes())
    with pytest.raises(ClusterError, match="impactx.explain.masking has other code than on the machine of the job"):
        check_plugins([dataclasses.replace(plugin, code="other")], ray.nodes())
