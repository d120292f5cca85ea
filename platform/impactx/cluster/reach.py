"""Whether every node of a cluster has its GPUs and the plugins, asked before any work starts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from impactx.cluster.capacity import ClusterError
from impactx.code import code_fingerprint
from impactx.plugins import Plugin

TIMEOUT = 600  # seconds in which all nodes must have answered; a first process takes about ten


def check_plugins(plugins: Sequence[Plugin], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Prove that a process on each node imports the plugins, and that their code is the same there.

    Args:
        plugins: The plugins as this process loaded them.
        nodes: Ray's description of the nodes (`ray.nodes()`).

    Raises:
        ClusterError: A node lacks a plugin or has other code of it; the message names both.
    """
    if not plugins:
        return
    able = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    try:
        answers = _on_each(able, problem, tuple(plugins))
    except Exception as error:  # a process that cannot start raises one of many classes of Ray's
        raise ClusterError(f"a node cannot import the plugins: {error}") from error
    for name, answer in answers:
        if answer:
            raise ClusterError(f"on node {name}: {answer}")


def check_gpus(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Prove that torch finds the GPUs on each node for which Ray counts some.

    No GPU is held for it: on a cluster that others use as well, all of them may be busy.

    Args:
        nodes: Ray's description of the nodes (`ray.nodes()`).

    Raises:
        ClusterError: A node has fewer than Ray counts; the message names it.
    """
    counted = [node for node in nodes if node["Alive"] and node["Resources"].get("GPU", 0) > 0]
    for node, (name, answer) in zip(counted, _on_each(counted, gpus_found), strict=True):
        if answer < node["Resources"]["GPU"]:
            raise ClusterError(
                f"Ray counts {node['Resources']['GPU']:g} GPUs on node {name}, where torch finds "
                f"{answer}: a driver is missing, torch is built for CPUs, or the node was started "
                "with GPUs that it does not have. Mend the node, start it with --num-gpus=0, or "
                "keep the job on CPUs by cluster.device=cpu")


def gpus_found() -> int:
    """Return how many GPUs torch finds on this machine, also those that this process must not use.

    Ray hides them from a process that holds none.
    """
    seen = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", count], env=seen, capture_output=True, text=True,
                          check=False)
    return 0 if done.returncode else int(done.stdout)


def _on_each(nodes: Sequence[Mapping[str, Any]], question: Callable[..., Any], *arguments: Any
             ) -> list[tuple[str, Any]]:
    """Return the address of each node, and what a process on it answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0)(question)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=strategy).remote(*arguments)] = str(
            node.get("NodeManagerAddress", node["NodeID"]))
    return list(zip(asked.values(), ray.get(list(asked), timeout=TIMEOUT), strict=True))


def problem(plugins: Sequence[Plugin]) -> str:
    """Return why this process cannot use the plugins, or ""."""
    for plugin in plugins:
        try:
            importlib.import_module(plugin.module)
            code = code_fingerprint(plugin.roots).digest
        except (Exception, SystemExit) as error:
            return (f"the plugin {plugin.module} cannot be imported: {type(error).__name__}: "
                    f"{error}. What it imports must be installed on every node, or be in modules "
                    "of yours, which travel with the job")
        if code != plugin.code:
            return f"the plugin {plugin.module} has other code than on the machine of the job"
    return ""
