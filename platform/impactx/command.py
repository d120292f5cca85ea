"""What the front ends in jobs/ share: options, errors as one message, logging, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from impactx.configuration import DEFAULT_PRESET, configs_folder, groups, load_settings, presets
from impactx.settings import ExperimentSettings

log = logging.getLogger("impactx")


class ExperimentOptions(argparse.Namespace):
    """Parsed options of a job that runs an experiment."""

    preset: str
    overrides: list[str]
    dry_run: bool
    configs: Path

    def load(self) -> ExperimentSettings:
        """The settings they name. Raises ConfigurationError."""
        return load_settings(self.preset, self.overrides, self.configs)


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """Options may stand before or after settings."""
        return super().parse_intermixed_args(args, namespace or ExperimentOptions())


def experiment_parser(description: str, job_file: str) -> argparse.ArgumentParser:
    """The command line of such a job: --preset, --dry-run and any number of setting=value."""
    folder = configs_folder(job_file)
    listed = "\n".join(f"  {group}: {', '.join(choices)}" for group, choices in groups(folder).items())
    parser = _Parser(formatter_class=argparse.RawDescriptionHelpFormatter, description=description, epilog=f"""\
groups (dataset=cifar10, model=[lenet5,mobilenet]); the files in configs/<group>/ say what they set:
{listed}

settings (training.epochs=20, grid.batch_size=[32,64], approaches.impactx.lambdas=[0.8]); those used most:
  output            folder or s3:// address of everything that is kept       (results)
  data_root         folder of the data sets                                  ($IMPACTX_DATA, or data)
  repeats           trainings of each selected configuration                 (5)
  seed              of repeat 0; repeat r has seed + r                       (0)
  grid.*            Table 1: learning_rate, batch_size, validation_fraction  (lists, or {{start, stop, step}})
  training.*        epochs, patience, optimizer, precision
  attribution.*     max_evals, batch_size, masker: what a map is
  cluster.*         address, trial_cpus, trial_gpus, train_workers, use_gpu, explain_cpu_actors, threads
  tracking.*        enabled, uri (default: MLFLOW_TRACKING_URI, else sqlite in the output folder), experiment
All of them, with defaults and meaning: docs/SETTINGS.md.""")
    parser.add_argument("overrides", nargs="*", metavar="setting=value",
                        help="change a setting, or choose from a group")
    parser.add_argument("--preset", default=DEFAULT_PRESET, help=f"one of {', '.join(presets(folder))} (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list what would run and what exists; start nothing")
    parser.set_defaults(configs=folder)
    return parser


def main(job: Callable[[], None]) -> None:
    """Run a job's function as a program: progress on stderr, a user's mistake as one message and exit status 2.

    Anything else that goes wrong is a traceback and exit status 1; Ctrl-C gives 130, SIGTERM 143.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(os.environ.get("IMPACTX_LOG", "INFO"))
    log.propagate = False
    received = [signal.SIGINT]  # Ray hands on that there was an interrupt, but not which

    def terminated(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    try:
        job()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + received[-1])
    except Exception as error:
        if not isinstance(error, _users_errors()):
            raise
        sys.exit(_failed(error))


def _users_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all that a user needs. Imported once there is one: some bring torch with them."""
    from impactx.cluster.connection import ClusterError
    from impactx.configuration import ConfigurationError
    from impactx.datasets.errors import DataError
    from impactx.experiment.plan import SelectionError
    from impactx.experiment.tracker import TrackingError
    from impactx.experiment.units import WorkError
    from impactx.explain.attribution import AttributionError
    from impactx.explain.forward import PartitionError
    from impactx.explain.partition import AdditivityError
    from impactx.explain.store import StoreError
    from impactx.storage import StorageError

    return (AdditivityError, AttributionError, ClusterError, ConfigurationError, DataError, PartitionError,
            SelectionError, StoreError, StorageError, TrackingError, WorkError)


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
