"""The options of the jobs that have settings, and their help."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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
    from impactx.run.explain import ModelChoice

EXPERIMENT_HELP = """\
groups (dataset=cifar10, model=[lenet5,mobilenet]); the files in configs/<group>/ set their values:
{groups}

settings (training.epochs=20, grid.batch_size=[32,64], approaches.impactx.lambdas=[0.8]);
those used most, with their defaults:
  output            folder or s3:// address of everything that is kept       (results)
  data_root         folder or s3:// address of the data sets                 ($IMPACTX_DATA or data)
  repeats           trainings of each selected configuration                 (5)
  seed              of repeat 0; repeat r has seed + r                       (0)
  grid.*            Table 1: learning_rate, batch_size, validation_fraction  (lists, or ranges
                    {{start, stop, step}}); how it is searched: strategy (grid, random, asha),
                    max_trials, max_hours
  training.*        epochs, patience, optimizer, precision
  attribution.*     the maps: max_evals, batch_size, masker
  models.<name>.resources.*   cpus, gpus (a share of one), workers: of trial, training, maps
  cluster.*         address, device (auto: GPUs where there are some; cpu), cells_at_once
  tracking.*        enabled, experiment, uri (MLFLOW_TRACKING_URI, or SQLite in the output folder)
  plugins           Python files of your own with extensions                 (none)
All of them, with defaults and meaning: docs/SETTINGS.md; extensions: docs/extending.md.{plugins}"""

EXPLAIN_HELP = """\
groups (dataset=digits attribution=occlusion); the files in configs/<group>/ set their values:
{groups}

settings: output (folder or s3:// address), data_root, cache, plugins, attribution.*,
maps.shard_size, resources.* (cpus, gpus, workers that make maps), cluster.*
All of them, with defaults and meaning: docs/SETTINGS.md.{plugins}"""


class ExperimentOptions(argparse.Namespace):
    """The options of a job that runs an experiment.

    Attributes:
        preset: The name of the preset.
        overrides: Choices of groups and values of settings.
        dry_run: The steps are only listed.
        plan: The costs are only measured.
        pilot: The repeats only show how many the job needs.
        configs: The folder of configurations.
    """

    preset: str
    overrides: list[str]
    dry_run: bool
    plan: bool
    pilot: bool
    configs: Path

    def load(self) -> ExperimentSettings:
        """Return the settings that the options name.

        Raises:
            ConfigurationError: They are wrong.
        """
        settings = load_settings(self.preset, self.overrides, self.configs)
        if self.pilot and settings.repeats < 2:
            raise ConfigurationError("--pilot with repeats = 1: one repeat has no spread that "
                                     "could propose a number; ask for at least 2 (5 are usual)")
        return settings


class ExplainOptions(argparse.Namespace):
    """The options of a job that explains a model of the user's.

    Attributes:
        overrides: Choices of groups and values of settings.
        preset: The preset from which all other settings come.
        model: The address of a checkpoint. One of model, timm, import_path and verify is given.
        timm: The name of a timm model.
        weights: With timm: a file, "hub" or "random".
        weights_match: With timm: as `ModelSettings.weights_match`.
        input_size: With timm: as `ModelSettings.input_size`, in pixels.
        mean: With timm: as `ModelSettings.mean`.
        std: With timm: as `ModelSettings.std`.
        import_path: package.module:function that returns a torch module.
        verify: The address of a store that is checked instead.
        sheet: The file into which examples are drawn, or None.
        sheet_images: The number of examples, at least 1.
        dry_run: Only a plan is printed.
        configs: The folder of configurations.
    """

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
        """Return the settings that the options name.

        Raises:
            ConfigurationError: They are wrong.
        """
        return load_settings(self.preset, self.overrides, self.configs, ExplainSettings)

    def choice(self) -> ModelChoice:
        """Return the model that the options name.

        Raises:
            ConfigurationError: The options of a timm model are wrong.
        """
        from pydantic import ValidationError

        from impactx.run.explain import ModelChoice

        if self.timm is None:
            return ModelChoice(checkpoint=self.model, path=self.import_path)
        try:
            return ModelChoice(timm=ModelSettings.model_validate({
                "name": "explained", "architecture": self.timm, "weights": self.weights,
                "weights_match": self.weights_match, "input_size": self.input_size,
                "mean": self.mean, "std": self.std}))
        except ValidationError as error:
            raise ConfigurationError("\n".join(
                f"--{str(one['loc'][0]).replace('_', '-') if one['loc'] else 'timm'}: "
                f"{one['msg']}, got {one['input']!r}" for one in error.errors())) from error


def experiment_options(description: str, job_file: str, arguments: list[str] | None = None
                       ) -> ExperimentOptions:
    """Parse the command line of a job that runs an experiment; exit with status 2 if it is wrong.

    Args:
        description: The first part of --help.
        job_file: The job's file, beside whose folder configs/ is.
        arguments: The command line; None for sys.argv's.

    Raises:
        ConfigurationError: There are no configurations.
        PluginError: Help is asked for, and one of the named plugins cannot be used.
    """
    folder = configs_folder(job_file)
    parser = _parser(description, EXPERIMENT_HELP.format(
        groups=_listed(groups(folder)), plugins=_help_of_plugins(arguments)), folder,
        f"one of {', '.join(presets(folder))} (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help=(
        "list which steps would run and which are done; start nothing"))
    parser.add_argument("--plan", action="store_true", help=(
        "measure a few steps of each model on this cluster and print what the job costs; train "
        "nothing"))
    parser.add_argument("--pilot", action="store_true", help=(
        "run the repeats that are set, and propose from their spread how many the job needs; they "
        "are reused, but not counted"))
    return parser.parse_intermixed_args(arguments, ExperimentOptions())


def explain_options(description: str, job_file: str, arguments: list[str] | None = None
                    ) -> ExplainOptions:
    """Parse the command line of jobs/explain.py; exit with status 2 if it is wrong.

    Args:
        description: The first part of --help.
        job_file: The job's file, beside whose folder configs/ is.
        arguments: The command line; None for sys.argv's.

    Raises:
        ConfigurationError: There are no configurations.
        PluginError: Help is asked for, and one of the named plugins cannot be used.
    """
    folder = configs_folder(job_file)
    used = {group: groups(folder).get(group, []) for group in ("dataset", "attribution")}
    parser = _parser(description, EXPLAIN_HELP.format(
        groups=_listed(used), plugins=_help_of_plugins(arguments)), folder,
        "the preset whose settings are the defaults (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="FILE", help=(
        "a checkpoint of impactx (path or s3:// address)"))
    which.add_argument("--timm", metavar="NAME", help=(
        "a timm model with as many classes as the images have"))
    which.add_argument("--import", metavar="MODULE:FUNCTION", dest="import_path", help=(
        "a function that returns a torch module"))
    which.add_argument("--verify", metavar="STORE", help=(
        "check every shard of a store (its folder or s3:// address)"))
    timm = parser.add_argument_group("with --timm")
    timm.add_argument("--weights", metavar="FILE|hub|random", help=(
        "a .pth or .safetensors file with all tensors of the model"))
    timm.add_argument("--weights-match", choices=("names", "order"), default="names", help=(
        "how tensors are assigned: by their names or in their order (%(default)s)"))
    timm.add_argument("--input-size", type=int, metavar="PIXELS", help=(
        "the side to which the model resizes its input"))
    timm.add_argument("--mean", type=float, nargs=3, metavar="X", help=(
        "the mean of each channel that the model subtracts; default: timm's"))
    timm.add_argument("--std", type=float, nargs=3, metavar="X", help=(
        "the standard deviation of each channel by which it divides; default: timm's"))
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help=(
        "draw examples: image, map, overlay"))
    parser.add_argument("--sheet-images", type=int, default=8, metavar="N", help=(
        "the number of examples (%(default)s)"))
    parser.add_argument("--dry-run", action="store_true", help=(
        "list which maps would be made and which are there; make nothing"))
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


def _parser(description: str, epilog: str, folder: Path, preset_help: str
            ) -> argparse.ArgumentParser:
    """Return a parser with what all jobs with settings have: settings and --preset."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help=(
        "change a setting, or choose from a group"))
    parser.add_argument("--preset", default=DEFAULT_PRESET, help=preset_help)
    parser.set_defaults(configs=folder)
    return parser


def _listed(choices: dict[str, list[str]]) -> str:
    return "\n".join(f"  {group}: {', '.join(names)}" for group, names in choices.items())


def _help_of_plugins(arguments: list[str] | None) -> str:
    """Return the part of --help on the extensions in plugins=[...] of the command line.

    Args:
        arguments: The command line; None for sys.argv's.

    Returns:
        A line for each extension with the names of its settings; "" if no help is asked for.

    Raises:
        PluginError: One of them cannot be used.
    """
    import yaml

    from impactx import plugins
    from impactx.settings.extensions import KINDS

    given = sys.argv[1:] if arguments is None else arguments
    if not {"-h", "--help"} & set(given):
        return ""
    files: list[str] = []
    for argument in given:
        if argument.startswith("plugins="):
            with contextlib.suppress(yaml.YAMLError):
                value = yaml.safe_load(argument.partition("=")[2])
                files = [str(file) for file in value] if isinstance(value, list) else []
    registries = {registry.kind: registry for registry in KINDS}
    lines = []
    for plugin in plugins.load(files):
        for kind, name in plugin.extensions:
            settings = ", ".join(registries[kind].get(name).model_fields)
            lines.append(f"  {kind} {name} ({plugin.file or plugin.module}): {settings}")
    if not lines:
        return ""
    return "\n\n" + "\n".join(["extensions of plugins, with their settings:", *lines])
