"""What the front ends in jobs/ share: options, errors as one message, logging, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impactx.configuration import (
    DEFAULT_PRESET,
    ConfigurationError,
    configs_folder,
    groups,
    load_settings,
    presets,
)
from impactx.settings import ExperimentSettings, ExplainSettings, ModelSettings

if TYPE_CHECKING:
    from impactx.results.records import Start

log = logging.getLogger("impactx")


class ExperimentOptions(argparse.Namespace):
    """Parsed options of a job that runs an experiment."""

    preset: str
    overrides: list[str]
    dry_run: bool
    plan: bool
    configs: Path

    def load(self) -> ExperimentSettings:
        """The settings they name. Raises ConfigurationError."""
        return load_settings(self.preset, self.overrides, self.configs)


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """Options may stand before or after settings."""
        return super().parse_intermixed_args(args, namespace or ExperimentOptions())


def _help_of_plugins(arguments: list[str] | None) -> str:
    """Return the part of --help about the extensions in plugins=[...] of the command line; "" if no help is asked for.

    Raises PluginError.
    """
    import yaml

    from impactx import plugins
    from impactx.settings.extensions import KINDS

    given = sys.argv[1:] if arguments is None else arguments
    if not {"-h", "--help"} & set(given):
        return ""
    files: list[str] = []
    for value in (argument.partition("=")[2] for argument in given if argument.startswith("plugins=")):
        with contextlib.suppress(yaml.YAMLError):
            files = value if isinstance(value := yaml.safe_load(value), list) else []
    lines = []
    for plugin in plugins.load([str(file) for file in files]):
        for kind, name in plugin.extensions:
            extension = next(registry for registry in KINDS if registry.kind == kind).get(name)
            lines.append(f"  {kind} {name} ({plugin.file or plugin.module}): {', '.join(extension.model_fields)}")
    return "\n\n" + "\n".join(["extensions of plugins, with their settings:", *lines]) if lines else ""


def experiment_parser(description: str, job_file: str, arguments: list[str] | None = None) -> argparse.ArgumentParser:
    """The command line of such a job: --preset, --dry-run and any number of setting=value.

    arguments: those that will be parsed (None: sys.argv's), whose plugins --help describes.
    """
    folder = configs_folder(job_file)
    listed = "\n".join(f"  {group}: {', '.join(choices)}" for group, choices in groups(folder).items())
    parser = _Parser(formatter_class=argparse.RawDescriptionHelpFormatter, description=description, epilog=f"""\
groups (dataset=cifar10, model=[lenet5,mobilenet]); the files in configs/<group>/ say what they set:
{listed}

settings (training.epochs=20, grid.batch_size=[32,64], approaches.impactx.lambdas=[0.8]); those used most:
  output            folder or s3:// address of everything that is kept       (results)
  data_root         folder or s3:// address of the data sets                 ($IMPACTX_DATA, or data)
  repeats           trainings of each selected configuration                 (5)
  seed              of repeat 0; repeat r has seed + r                       (0)
  grid.*            Table 1: learning_rate, batch_size, validation_fraction  (lists, or {{start, stop, step}});
                    strategy (grid, random, asha), max_trials, max_hours: how much of it is done
  training.*        epochs, patience, optimizer, precision
  attribution.*     max_evals, batch_size, masker: what a map is
  cluster.*         address, trial_cpus, trial_gpus, train_workers, use_gpu, explain_cpu_actors, cells_at_once
  tracking.*        enabled, uri (default: MLFLOW_TRACKING_URI, else sqlite in the output folder), experiment
  plugins           Python files of your own with extensions                 (none; docs/extending.md)
All of them, with defaults and meaning: docs/SETTINGS.md.{_help_of_plugins(arguments)}""")
    parser.add_argument("overrides", nargs="*", metavar="setting=value",
                        help="change a setting, or choose from a group")
    parser.add_argument("--preset", default=DEFAULT_PRESET, help=f"one of {', '.join(presets(folder))} (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list what would run and what exists; start nothing")
    parser.add_argument("--plan", action="store_true", help=(
        "measure a few steps of each model on this cluster and print what the job costs; train nothing"))
    parser.set_defaults(configs=folder)
    return parser


class ExplainOptions(argparse.Namespace):
    """Parsed options of a job that explains a model of the user's."""

    overrides: list[str]
    preset: str
    model: str | None
    timm: str | None
    weights: str | None
    weights_match: str
    input_size: int | None
    mean: list[float] | None
    std: list[float] | None
    import_path: str | None
    verify: str | None
    sheet: Path | None
    sheet_images: int
    dry_run: bool
    configs: Path

    def settings(self) -> ExplainSettings:
        """The settings they name. Raises ConfigurationError."""
        return load_settings(self.preset, self.overrides, self.configs, ExplainSettings)

    def choice(self) -> Any:
        """The model that they name, as explain_job.ModelChoice. Raises ConfigurationError."""
        from pydantic import ValidationError

        from impactx.run.explain import ModelChoice

        if self.timm is None:
            return ModelChoice(checkpoint=self.model, path=self.import_path)
        try:
            return ModelChoice(timm=ModelSettings(
                name="explained", architecture=self.timm, weights=self.weights, weights_match=self.weights_match,
                input_size=self.input_size, mean=self.mean, std=self.std))
        except ValidationError as error:
            raise ConfigurationError("\n".join(
                f"--{str(e['loc'][0]).replace('_', '-') if e['loc'] else 'timm'}: {e['msg']}, got {e['input']!r}"
                for e in error.errors())) from error


def explain_options(description: str, job_file: str, arguments: list[str] | None = None) -> ExplainOptions:
    """Parse the command line of jobs/explain.py; exits with status 2 and a message where it is wrong."""
    folder = configs_folder(job_file)
    listed = "\n".join(f"  {group}: {', '.join(groups(folder).get(group, []))}" for group in ("dataset", "attribution"))
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=description, epilog=f"""\
groups (dataset=digits attribution=occlusion); the files in configs/<group>/ say what they set:
{listed}

settings: output (folder or s3:// address), data_root, cache, plugins, attribution.*, maps.shard_size, cluster.*
All of them, with defaults and meaning: docs/SETTINGS.md.{_help_of_plugins(arguments)}""")
    parser.add_argument("overrides", nargs="*", metavar="setting=value",
                        help="change a setting, or choose from a group")
    parser.add_argument("--preset", default=DEFAULT_PRESET, help="whose settings are the defaults (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="FILE", help="a checkpoint of impactx (path or s3:// address)")
    which.add_argument("--timm", metavar="NAME", help="a timm model with as many classes as the images have")
    which.add_argument("--import", metavar="MODULE:FUNCTION", dest="import_path",
                       help="a function that returns a torch module")
    which.add_argument("--verify", metavar="STORE", help="check every shard of a store (its folder or s3:// address)")
    timm = parser.add_argument_group("with --timm")
    timm.add_argument("--weights", metavar="FILE|hub|random", help="a .pth or .safetensors file with all its tensors")
    timm.add_argument("--weights-match", choices=("names", "order"), default="names", help="(%(default)s)")
    timm.add_argument("--input-size", type=int, metavar="PIXELS", help="side to which the model enlarges its input")
    timm.add_argument("--mean", type=float, nargs=3, metavar="X", help="of the normalisation; default: timm's own")
    timm.add_argument("--std", type=float, nargs=3, metavar="X")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw examples: image, map, overlay")
    parser.add_argument("--sheet-images", type=int, default=8, metavar="N", help="how many (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made and what is there; make nothing")
    parser.set_defaults(configs=folder)
    options = parser.parse_intermixed_args(arguments, ExplainOptions())
    if not any((options.model, options.timm, options.import_path, options.verify)):
        parser.error("which model? give --model, --timm or --import (or --verify a store)")
    if options.timm and not options.weights:
        parser.error("--timm needs --weights: a file, hub or random")
    if options.weights and not options.timm:
        parser.error("--weights goes with --timm")
    if options.sheet_images < 1:
        parser.error("--sheet-images: at least 1")
    return options


def start_facts() -> Start:
    """How and where this process was started, for a job's journal: command, code, machine, versions."""
    from impactx.results.records import Start
    from impactx.tracking.addresses import redact
    from impactx.version import code_version, machine, package_versions

    return Start(command=redact(shlex.join(["python", *sys.argv])), code=code_version(), machine=machine(),
                 versions=package_versions())


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

    return (AdditivityError, AttributionError, ClusterError, ConfigurationError, DataError, ExportError, MaskerError,
            PartitionError, PluginError, PredictionError, ReportError, SelectionError, SheetError, StoreError, StorageError,
            TrackingError, StepError)


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
