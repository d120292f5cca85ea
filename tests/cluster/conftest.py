"""One small Ray cluster for all tests of a session that need one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from impactx.cluster.access import private_cluster

sys.path.insert(0, str(Path(__file__).parent))  # the tests' own lab.py


@pytest.fixture(scope="session", autouse=True)
def token() -> Path:
    """The file of the token of every cluster that these tests start themselves; jobs draw their own."""
    with private_cluster() as path:
        yield path


@pytest.fixture(scope="session")
def cluster(token):
    """A running cluster (ray.cluster_utils) that is connected to: 2 CPUs, one GPU that only the scheduler knows."""
    from ray.cluster_utils import Cluster

    from impactx.cluster.connection import connected
    from impactx.settings import ClusterSettings

    how = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False, "object_store_memory": 128 * 2**20,
           "dashboard_agent_listen_port": 0}  # the usual port is for the clusters of jobs under test
    for last in (False, False, True):  # Ray gives a node 30 s to start, which a busy machine may exceed
        try:
            node = Cluster(initialize_head=True, head_node_args=how)
            break
        except Exception as error:
            if last or "timed out during startup" not in str(error):
                raise
    with connected(ClusterSettings(address=node.address, device="logical"), {}):
        yield node
    node.shutdown()


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The folder of decoded images."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def lab(tmp_path, cache):
    """Makes labs in folders of their own."""
    from lab import Lab

    return lambda name="output", **changes: Lab(tmp_path / name, cache, **changes)
