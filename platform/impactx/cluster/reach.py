"""Whether every node of a cluster can import the plugins, asked before any work starts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
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
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    task = ray.remote(num_cpus=0)(problem)
    for node in nodes:
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=strategy).remote(tuple(plugins))] = node
    try:
        answers = ray.get(list(asked), timeout=TIMEOUT)
    except Exception as error:  # a process that cannot start raises one of many classes of Ray's
        raise ClusterError(f"a node cannot import the plugins: {error}") from error
    for node, answer in zip(asked.values(), answers, strict=True):
        if answer:
            name = node.get("NodeManagerAddress", node["NodeID"])
            raise ClusterError(f"on node {name}: {answer}")


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
