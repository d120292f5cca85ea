"""What fits on a cluster: processes on its nodes, what it may grow to, whether it has GPUs.

Numbers only, and no Ray: what there is comes as Ray describes it (`cluster_resources`, `nodes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from impactx.settings import ClusterSettings, ModelResources, ProcessResources, TrainingResources

EPSILON = 1e-6


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


def uses_gpus(settings: ClusterSettings, have: Mapping[str, float]) -> bool:
    """Return whether models that ask for GPUs get them: where there are some, or may be."""
    return settings.device != "cpu" and grown(settings, have)["GPU"] > 0


def trainings_at_once(wanted: TrainingResources, have: Mapping[str, float]) -> int:
    """Return how many trainings of a model fit at once; at least 1."""
    return max(1, processes(wanted.cpus, wanted.gpus, have) // wanted.workers)


def cells_at_once(settings: ClusterSettings, models: Iterable[ModelResources],
                  have: Mapping[str, float]) -> int:
    """Return how many cells are under way at once: the setting, or one for each trial that fits.

    At least 3, so that the maps of one cell do not wait for the trials of another. Of several
    models the one counts of which most trials fit.
    """
    trials = [trainings_at_once(model.trial, have) for model in models]
    most = min(max(trials, default=1), settings.max_concurrent_trials or math.inf)
    return settings.cells_at_once or max(3, int(most))


def makers(model: ModelResources, have: Mapping[str, float]) -> tuple[int, int]:
    """Return how many actors make maps, and how many on CPUs may join those on GPUs.

    Those that join leave the GPUs the CPUs of all the processes that may share them.
    """
    maps = model.maps
    fits = processes(maps.cpus, maps.gpus, have)
    if not maps.gpus or maps.workers is not None:
        return max(1, min(fits, maps.workers or fits)), 0
    kept = max(one.cpus * processes(one.cpus, one.gpus, have)
               for one in (model.trial, model.training, maps))
    return max(1, fits), processes(maps.cpus, 0, {"CPU": max(have.get("CPU", 0.0) - kept, 0.0)})


def check(settings: ClusterSettings, nodes: Sequence[Mapping[str, Any]],
          wanted: Mapping[str, ProcessResources]) -> None:
    """Check that what the models ask for fits, also once the cluster has grown as far as it may.

    Args:
        settings: Of the cluster.
        nodes: As `ray.nodes()` gives them.
        wanted: What each kind of process asks for, by the setting that says so.

    Raises:
        ClusterError: Something fits on no node, or not all at once.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    have = {kind: sum(node.get(kind, 0.0) for node in alive) for kind in ("CPU", "GPU")}
    may_have, on_gpus = grown(settings, have), uses_gpus(settings, have)
    # Nodes that are not there yet may be of any size.
    held_by = [*alive, {kind: may_have[kind] - have[kind] for kind in have}]
    wrong = []
    for setting, one in wanted.items():
        gpus = one.gpus if on_gpus else 0.0
        count = one.workers if isinstance(one, TrainingResources) else 1
        room = sum(processes(one.cpus, gpus, node) for node in held_by)
        if room < count:
            largest = _largest(alive, "GPU" if gpus else "CPU")
            workers = f"workers = {count}, each with " if count > 1 else ""
            wrong.append(
                f"{setting}: {workers}cpus = {one.cpus:g} and gpus = {gpus:g} on one node: there "
                f"is room for {room} (the largest of {len(alive)} nodes has "
                f"{largest.get('CPU', 0):g} CPUs and {largest.get('GPU', 0):g} GPUs, all of them "
                f"may come to {may_have['CPU']:g} and {may_have['GPU']:g})")
    if wrong:
        raise ClusterError(
            f"the cluster is too small: {'; '.join(wrong)}. Ask for less, add nodes, or, where the "
            "cluster starts nodes on demand, say by cluster.grows_to_cpus and grows_to_gpus what "
            "it may come to" + (", or leave GPUs out by cluster.device=cpu" if on_gpus else ""))


def _largest(nodes: Sequence[Mapping[str, float]], kind: str) -> Mapping[str, float]:
    """Return the resources of the node that has most of a kind, and among equals most CPUs."""
    none: Mapping[str, float] = {}
    return max(nodes, key=lambda node: (node.get(kind, 0.0), node.get("CPU", 0.0)), default=none)
