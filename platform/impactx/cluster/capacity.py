"""What fits on a cluster: processes on its nodes, what it may grow to, who makes maps.

Numbers only, and no Ray: what there is comes as Ray describes it (`cluster_resources`, `nodes`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from impactx.cluster.devices import alone
from impactx.settings import ClusterSettings

log = logging.getLogger("impactx")
EPSILON = 1e-6
# CPUs and GPUs of an actor that makes maps on a GPU: it keeps no CPU from the actors on CPUs.
MAKER_ON_GPU = (0.0, 1.0)


class ClusterError(RuntimeError):
    """The cluster cannot do what is asked; the message says what it has and what is missing."""


def blocked(gpus: float) -> float:
    """Return the share of a GPU that a process keeps from others of its kind.

    Ray places a fraction on one GPU only: 0.4 of it leaves room for one more, and so keeps half.
    """
    return 1 / math.floor(1 / gpus + EPSILON) if 0 < gpus < 1 else gpus


def processes(cpus: float, gpus: float, have: Mapping[str, float]) -> int:
    """Return how many processes that ask for so much fit on nodes with these resources."""
    rooms = [(have.get("CPU", 0.0) + EPSILON) // cpus] if cpus else []
    if gpus:
        rooms.append(math.floor(have.get("GPU", 0.0) + EPSILON) / blocked(gpus) + EPSILON)
    return int(min(rooms))


def grown(settings: ClusterSettings, have: Mapping[str, float]) -> dict[str, float]:
    """Return the CPUs and GPUs that there are, or that the cluster may come to."""
    return {"CPU": max(have.get("CPU", 0.0), settings.grows_to_cpus or 0),
            "GPU": max(have.get("GPU", 0.0), settings.grows_to_gpus or 0)}


def trials_at_once(settings: ClusterSettings, have: Mapping[str, float]) -> int:
    """Return how many trials fit at once, of all cells together; at least 1."""
    fits = processes(settings.trial_cpus, settings.trial_gpus, have) // settings.trial_workers
    return max(1, min(fits, settings.max_concurrent_trials or fits))


def trainings_at_once(settings: ClusterSettings, have: Mapping[str, float]) -> int:
    """Return how many final trainings fit at once; at least 1."""
    fits = processes(settings.train_cpus, float(settings.use_gpu), have)
    return max(1, fits // settings.train_workers)


def cells_at_once(settings: ClusterSettings, have: Mapping[str, float]) -> int:
    """Return how many cells are under way at once: the setting, or one for each trial that fits.

    At least 3, so that the maps of one cell do not wait for the trials of another.
    """
    return settings.cells_at_once or max(3, trials_at_once(settings, have))


def makers(settings: ClusterSettings, have: Mapping[str, float]) -> tuple[int, int]:
    """Return how many actors make maps on CPUs and on GPUs.

    Raises:
        ClusterError: There is none of either.
    """
    s = settings
    wanted = (("explain_cpu_actors", "CPU", s.explain_cpu_actors),
              ("explain_gpu_actors", "GPU", s.explain_gpu_actors))
    cpus, gpus = (int(have.get(kind, 0) + EPSILON) if value is None else value
                  for _, kind, value in wanted)
    if cpus + gpus == 0:
        reasons = [f"cluster.{name} is " + (
            f"unset, which is one a {kind}, and the cluster has none" if value is None
            else str(value)) for name, kind, value in wanted]
        raise ClusterError(f"nobody would make maps: {'; '.join(reasons)}. Set one of them to 1 or "
                           "more, or explain_cpu_actors to null for one a CPU")
    return cpus, gpus


def check(settings: ClusterSettings, nodes: Sequence[Mapping[str, Any]], trains: bool = True
          ) -> None:
    """Check that what the settings ask for fits, also once the cluster has grown as far as it may.

    It warns of GPUs that nothing uses.

    Args:
        settings: Of the cluster.
        nodes: As `ray.nodes()` gives them.
        trains: Whether the job trains, or only makes maps.

    Raises:
        ClusterError: Something fits on no node, or not all at once.
    """
    s = settings
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    have = {kind: sum(node.get(kind, 0.0) for node in alive) for kind in ("CPU", "GPU")}
    may_have = grown(s, have)
    # Nodes that are not there yet may be of any size.
    held_by = [*alive, {kind: may_have[kind] - have[kind] for kind in have}]
    wrong = []
    for name, count, cpus, gpus, each in _wanted(s, trains):
        room = sum(processes(cpus, gpus, node) for node in held_by)
        if room < count:
            kind = "GPU" if gpus else "CPU"
            largest = _largest(alive, kind)
            wrong.append(
                f"{name}{', each' * (count > 1)} with {each} on one node: there is room for {room} "
                f"(the largest of {len(alive)} nodes has {largest.get('CPU', 0):g} CPUs and "
                f"{largest.get('GPU', 0):g} GPUs, all of them may come to {may_have['CPU']:g} and "
                f"{may_have['GPU']:g})")
    if wrong:
        raise ClusterError(
            f"the cluster is too small: {'; '.join(wrong)}. Ask for less, add nodes, or, where the "
            "cluster starts nodes on demand, say by cluster.grows_to_cpus and grows_to_gpus what "
            "it may come to")
    makers(s, may_have)
    if trains and have["GPU"] and not s.trial_gpus and not s.use_gpu:
        log.warning(
            "the cluster has %g GPUs, and all trainings are on CPUs: cluster.trial_gpus is 0 and "
            "cluster.use_gpu is false. For GPUs: cluster.trial_gpus=1 (0.25: four trials share "
            "one) cluster.use_gpu=true", have["GPU"])


def _largest(nodes: Sequence[Mapping[str, float]], kind: str) -> Mapping[str, float]:
    """Return the resources of the node that has most of a kind, and among equals most CPUs."""
    none: Mapping[str, float] = {}
    return max(nodes, key=lambda node: (node.get(kind, 0.0), node.get("CPU", 0.0)), default=none)


def _wanted(s: ClusterSettings, trains: bool) -> list[tuple[str, int, float, float, str]]:
    """Return what is asked for: its name, how many, CPUs and GPUs of each, and that in words."""
    cpus, gpus = alone(s)
    wanted = [
        (f"cluster.trial_workers = {s.trial_workers}", s.trial_workers, s.trial_cpus, s.trial_gpus,
         f"trial_cpus = {s.trial_cpus:g} and trial_gpus = {s.trial_gpus:g}"),
        (f"cluster.train_workers = {s.train_workers}", s.train_workers, s.train_cpus,
         float(s.use_gpu),
         f"train_cpus = {s.train_cpus:g} and {float(s.use_gpu):g} GPUs (use_gpu)"),
        ("a test of a model", 1, cpus, gpus,
         f"trial_cpus = {s.trial_cpus:g} and {gpus:g} GPUs (trial_gpus, or one with use_gpu)"),
    ] if trains else []
    return [*wanted, (f"cluster.explain_gpu_actors = {s.explain_gpu_actors}",
                      s.explain_gpu_actors or 0, *MAKER_ON_GPU, "one GPU")]
