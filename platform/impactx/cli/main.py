"""Running a job as a program: its log, a user's mistake as one message, exit codes."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from impactx.results.records import Start

log = logging.getLogger("impactx")


def main(job: Callable[[], None]) -> None:
    """Run a job's function as a program that logs its progress to stderr.

    A user's mistake ends it with one message and exit status 2; any other error with a traceback
    and 1, Ctrl-C with 130, SIGTERM with 143.

    Args:
        job: Does everything, and prints its results.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(os.environ.get("IMPACTX_LOG", "INFO"))
    log.propagate = False
    # Ray hands on that there was an interrupt, but not by which signal.
    received = [signal.SIGINT]

    def terminated(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    try:
        job()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + received[-1])
    except Exception as error:
        if not isinstance(error, _errors_of_users()):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def start_facts() -> Start:
    """Return the command, code, machine and versions of this process, for a job's journal."""
    from impactx.results.records import Start
    from impactx.tracking.addresses import redact
    from impactx.version import code_version, machine, package_versions

    return Start(command=redact(shlex.join(["python", *sys.argv])), code=code_version(),
                 machine=machine(), versions=package_versions())


def _errors_of_users() -> tuple[type[Exception], ...]:
    """Return the errors whose message is all that a user needs.

    They are imported once an error occurred: some of their modules import torch.
    """
    from impactx.cluster.capacity import ClusterError
    from impactx.configuration import ConfigurationError
    from impactx.datasets.errors import DataError
    from impactx.experiment.groups import SelectionError
    from impactx.experiment.steps.base import StepError
    from impactx.explain.attribution import AttributionError
    from impactx.explain.maps.sheet import SheetError
    from impactx.explain.maps.store import StoreError
    from impactx.explain.partition.engine import AdditivityError
    from impactx.explain.partition.forward import PartitionError
    from impactx.plugins import PluginError
    from impactx.prediction import PredictionError
    from impactx.report import ReportError
    from impactx.results.export import ExportError
    from impactx.run.tracker import TrackingError
    from impactx.settings.masker import MaskerError
    from impactx.storage import StorageError

    return (AdditivityError, AttributionError, ClusterError, ConfigurationError, DataError,
            ExportError, MaskerError, PartitionError, PluginError, PredictionError, ReportError,
            SelectionError, SheetError, StepError, StoreError, StorageError, TrackingError)
