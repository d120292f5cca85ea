"""Connecting to a Ray cluster, or starting one for the time of the job."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import impactx
from impactx import plugins
from impactx.cluster.access import private_cluster, read_authentication
from impactx.cluster.capacity import ClusterError, check, uses_gpus
from impactx.cluster.reach import check_gpus, check_plugins
from impactx.settings import ClusterSettings, ExplainSettings, ModelResources, ProcessResources

if TYPE_CHECKING:
    from impactx.cluster.executor import RayExecutor
    from impactx.experiment.workplace import Workplace

log = logging.getLogger("impactx")


@contextlib.contextmanager
def connected(settings: ClusterSettings, wanted: Mapping[str, ProcessResources],
              plugin_files: Sequence[str] = ()) -> Iterator[dict[str, float]]:
    """Connect to settings.address, to RAY_ADDRESS, or to a cluster of this machine's own.

    Args:
        settings: Where, and with what.
        wanted: What each kind of process of the job asks for, by the setting that says so.
        plugin_files: The files of the user's extensions, `plugins` of the job's settings. Every
            process of the cluster can import them.

    Raises:
        ClusterError: An address does not answer, what the job needs does not fit (capacity.check),
            a node lacks GPUs that Ray counts on it, or cannot import a plugin.
        PluginError: A plugin cannot be used on this machine.
    """
    loaded = plugins.load(plugin_files)
    with plugins.runtime_environment(loaded) as environment:
        yield from _connected(settings, wanted, loaded, environment)


def _connected(settings: ClusterSettings, wanted: Mapping[str, ProcessResources],
               loaded: Sequence[plugins.Plugin], environment: plugins.RuntimeEnvironment
               ) -> Iterator[dict[str, float]]:
    # Results are plain files: Ray's own reports of usage and of Train's migration are noise for the
    # user.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # A trial that another process has finished meanwhile ends without a metric.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # Ctrl-C ends the job; Tune would only end the search, and the best of what is there would be
    # selected.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Trials report to the output and to MLflow; Tune's own files, which this warns of, are not
    # written.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    address = settings.address or os.environ.get("RAY_ADDRESS")
    # Threads are torch's and ours to set: Ray would otherwise set OMP_NUM_THREADS by the CPUs of a
    # task.
    variables = {"OMP_NUM_THREADS": str(settings.threads), "RAY_TRAIN_V2_ENABLED": "1",
                 "RAY_DATA_USAGE_DISABLED": "1", **environment.variables}
    package = Path(impactx.__file__).resolve().parent
    # Ray sets its own handler, which ends the cluster before the job.
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address:
        # The package travels with the job, so every worker runs the driver's code, installed or
        # not.
        modules = [str(module) for module in (package, *environment.modules)]
        options |= {"address": address,
                    "runtime_env": {"env_vars": variables, "py_modules": modules}}
    else:
        paths = (package.parent, os.environ.get("PYTHONPATH"), environment.folder)
        variables["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        options |= {"address": "local", "num_cpus": settings.num_cpus, "include_dashboard": False,
                    "runtime_env": {"env_vars": variables}, "object_store_memory": 256 * 2**20}
    with contextlib.nullcontext() if address else private_cluster():
        read_authentication()
        try:
            _start(options)
        except Exception as error:  # Ray raises whatever comes, bare Exception included
            raise ClusterError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        finally:
            _restore(handler)
        yield from _checked(settings, address, wanted, loaded)


def _start(options: dict[str, Any]) -> None:
    """Connect or start; a local cluster is tried twice.

    Ray gives its processes 30 s to start, which is little on a busy machine.
    """
    import ray

    try:
        ray.init(**options)
    except Exception as error:
        if options["address"] != "local" or "timed out" not in str(error):
            raise
        log.warning("the local Ray cluster did not start in time (%s): tried once more",
                    str(error).strip().splitlines()[0])
        ray.shutdown()
        ray.init(**options)


def _checked(settings: ClusterSettings, address: str | None,
             wanted: Mapping[str, ProcessResources], loaded: Sequence[plugins.Plugin]
             ) -> Iterator[dict[str, float]]:
    """Yield the cluster's resources once they are known to be enough; disconnect after that."""
    import ray

    try:
        resources = ray.cluster_resources()
        check(settings, ray.nodes(), wanted)
        on_gpus = uses_gpus(settings, resources) and any(one.gpus for one in wanted.values())
        log.info("cluster: %g CPUs, %g GPUs, %d node(s)%s; the work is done on %s",
                 resources.get("CPU", 0), resources.get("GPU", 0),
                 sum(node["Alive"] for node in ray.nodes()),
                 f" at {address}" if address else ", on this machine",
                 "GPUs" if on_gpus else "CPUs")
        if on_gpus and settings.device == "auto":
            check_gpus(ray.nodes())
        check_plugins(loaded, ray.nodes())
        yield resources
    finally:
        ray.shutdown()


def _restore(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def executor_when_needed(settings: ExplainSettings, place: Workplace, model: str
                         ) -> Iterator[Callable[[], RayExecutor]]:
    """Yield a function that connects, and returns an executor that makes maps of a model.

    A job that has nothing left to do calls it never, and starts no cluster.

    Args:
        settings: Of the job.
        place: Where the maps are kept.
        model: The name that the job's step has for the model.
    """
    with contextlib.ExitStack() as stack:
        def executor() -> RayExecutor:
            stack.enter_context(connected(settings.cluster, settings.processes(), settings.plugins))
            from impactx.cluster.executor import RayExecutor
            from impactx.run.no_tracker import NoTracker

            resources = {model: ModelResources(maps=settings.resources)}
            return RayExecutor(settings.cluster, place, NoTracker(), resources)

        yield executor
