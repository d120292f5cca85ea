"""What fits on a cluster: how many processes a node holds, what it may grow to, who makes maps,
whether all fits.

Numbers only, and no Ray: what there is comes as Ray tells it (`cluster_resources`, `nodes`).
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
MAKER_ON_GPU = (0.0, 1.0)  # CPUs and GPUs of an actor that makes maps on a GPU: no CPU is kept from those on CPUs


class ClusterError(RuntimeError):
    """The cluster cannot do what is asked; the message says what it has and what is missing."""


def blocked(gpus: float) -> float:
    """What a process with so many GPUs keeps from others of its kind: Ray places a fraction on one
    GPU only, so 0.4 of it leaves room for one more, and is half.
    """
    return 1 / math.floor(1 / gpus + EPSILON) if 0 < gpus < 1 else gpus


def processes(cpus: float, gpus: float, have: Mapping[str, float]) -> int:
    """How many processes that ask for so much are held by a node, or nodes, with these resources.
    """
    rooms = [(have.get("CPU", 0.0) + EPSILON) // cpus] if cpus else []
    if gpus:
        rooms.append(math.floor(have.get("GPU", 0.0) + EPSILON) / blocked(gpus) + EPSILON)
    return int(min(rooms))


def grown(settings: ClusterSettings, have: Mapping[str, float]) -> dict[str, float]:
    """The CPUs and GPUs that there are, or that the cluster may come to."""
    return {"CPU": max(have.get("CPU", 0.0), settings.grows_to_cpus or 0),
            "GPU": max(have.get("GPU", 0.0), settings.grows_to_gpus or 0)}


def trials_at_once(settings: ClusterSettings, have: Mapping[str, float]) -> int:
    """Of all cells together; at least 1."""
    fits = processes(settings.trial_cpus, settings.trial_gpus, have) // settings.trial_workers
    return max(1, min(fits, settings.max_concurrent_trials or fits))


def trainings_at_once(settings: ClusterSettings, have: Mapping[str, float]) -> int:
    """Final trainings; at least 1."""
    return max(1, processes(settings.train_cpus, float(settings.use_gpu), have) // settings.train_workers)


def cells_at_once(settings: ClusterSettings, have: Mapping[str, float]) -> int:
    """A setting, or one for each trial that is under way at once: with more cells than that, each
    trial would be a process of its own, since what one cell lets go of another takes. At least 3,
    or a cell's maps would wait for no good reason.
    """
    return settings.cells_at_once or max(3, trials_at_once(settings, have))


def makers(settings: ClusterSettings, have: Mapping[str, float]) -> tuple[int, int]:
    """How many actors make maps on CPUs and on GPUs. Raises ClusterError where there is none of
    either.
    """
    s = settings
    cpus = s.explain_cpu_actors if s.explain_cpu_actors is not None else int(have.get("CPU", 0) + EPSILON)
    gpus = s.explain_gpu_actors if s.explain_gpu_actors is not None else int(have.get("GPU", 0) + EPSILON)
    if cpus + gpus == 0:
        said = [f"cluster.{name} is " + (f"unset, which is one a {kind}, and the cluster has none" if value is None
                                         else f"{value}")
                for name, kind, value in (("explain_cpu_actors", "CPU", s.explain_cpu_actors),
                                          ("explain_gpu_actors", "GPU", s.explain_gpu_actors))]
        raise ClusterError(f"nobody would make maps: {'; '.join(said)}. Set one of them to 1 or more, or "
                           "explain_cpu_actors to null for one a CPU")
    return cpus, gpus


def check(settings: ClusterSettings, nodes: Sequence[Mapping[str, Any]], trains: bool = True) -> None:
    """Raise ClusterError where what the settings ask for fits on no node, or not all at once, also
    once the cluster has grown as far as it may; warn of GPUs that nothing uses. nodes: as
    ray.nodes(); trains: whether the job does.
    """
    s = settings
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    have = {kind: sum(node.get(kind, 0.0) for node in alive) for kind in ("CPU", "GPU")}
    may_have = grown(s, have)
    # Nodes that are not there yet may be of any size.
    held_by = [*alive, {kind: may_have[kind] - have[kind] for kind in have}]
    wanted = [(f"cluster.trial_workers = {s.trial_workers}", s.trial_workers, s.trial_cpus, s.trial_gpus,
               f"trial_cpus = {s.trial_cpus:g} and trial_gpus = {s.trial_gpus:g}"),
              (f"cluster.train_workers = {s.train_workers}", s.train_workers, s.train_cpus, float(s.use_gpu),
               f"train_cpus = {s.train_cpus:g} and {float(s.use_gpu):g} GPUs (use_gpu)"),
              ("a test of a model", 1, *alone(s), f"trial_cpus = {s.trial_cpus:g} and {alone(s)[1]:g} GPUs "
               "(trial_gpus, or one with use_gpu)")] if trains else []
    wanted.append((f"cluster.explain_gpu_actors = {s.explain_gpu_actors}", s.explain_gpu_actors or 0, *MAKER_ON_GPU,
                   "one GPU"))
    wrong = []
    for name, count, cpus, gpus, each in wanted:
        room = sum(processes(cpus, gpus, node) for node in held_by)
        if room < count:
            kind = "GPU" if gpus else "CPU"
            largest = max(alive, key=lambda node: (node.get(kind, 0.0), node.get("CPU", 0.0)), default={})
            wrong.append(f"{name}{', each' * (count > 1)} with {each} on one node: there is room for {room} (the "
                         f"largest of {len(alive)} nodes has {largest.get('CPU', 0):g} CPUs and "
                         f"{largest.get('GPU', 0):g} GPUs, all of them may come to {may_have['CPU']:g} and "
                         f"{may_have['GPU']:g})")
    if wrong:
        raise ClusterError("the cluster is too small: " + "; ".join(wrong) + ". Ask for less, add nodes, or, where "
                           "the cluster starts nodes on demand, say by cluster.grows_to_cpus and grows_to_gpus what it "
                           "may come to")
    makers(s, may_have)
    if trains and have["GPU"] and not s.trial_gpus and not s.use_gpu:
        log.warning("the cluster has %g GPUs, and all trainings are on CPUs: cluster.trial_gpus is 0 and "
                    "cluster.use_gpu is false. For GPUs: cluster.trial_gpus=1 (0.25: four trials share one) "
                    "cluster.use_gpu=true", have["GPU"])
