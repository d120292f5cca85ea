"""Loading the settings of a job; all mistakes are reported in one message."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from impactx import plugins
from impactx.configuration.files import (
    DEFAULT_PRESET,
    ConfigurationError,
    compose,
    configs_folder,
    groups,
    presets,
)
from impactx.configuration.messages import did_you_mean, in_words
from impactx.configuration.overrides import field_of, key_and_value, lay_over, read_overrides
from impactx.fetching import is_remote
from impactx.settings import ExperimentSettings, Settings

Root = typing.TypeVar("Root", bound=Settings)


@typing.overload
def load_settings(preset: str = ..., overrides: Sequence[str] = ...,
                  folder: str | Path | None = ...) -> ExperimentSettings: ...
@typing.overload
def load_settings(preset: str, overrides: Sequence[str], folder: str | Path | None,
                  root: type[Root]) -> Root: ...
def load_settings(preset: str = DEFAULT_PRESET, overrides: Sequence[str] = (),
                  folder: str | Path | None = None,
                  root: type[Settings] = ExperimentSettings) -> Settings:
    """Return the settings of a preset with overrides.

    Args:
        preset: The name of a preset.
        overrides: group=choice, group=[choice,choice] or a.b.c=value, with values in YAML.
        folder: The folder of configurations; None for the one that `configs_folder` returns.
        root: The class of the settings. A job that needs fewer settings than an experiment takes
            those of the preset that it has.

    Raises:
        ConfigurationError: Something is wrong; the message has all errors at once.
        PluginError: A plugin cannot be used.
    """
    folder = Path(folder) if folder else configs_folder()
    if preset not in (names := presets(folder)):
        raise ConfigurationError(f"preset {preset!r} does not exist: {did_you_mean(preset, names)}"
                                 f"there are {', '.join(names)} (in {folder})")
    plugins.load(_plugin_files(folder, preset, overrides))  # any setting can name their extensions
    changes = read_overrides(overrides, folder, root)
    composed = {
        name: value for name, value in _choose(folder, preset, changes.choices).items()
        if name in root.model_fields or name not in ExperimentSettings.model_fields}
    errors = changes.errors + lay_over(composed, changes.values)
    settings = None
    try:
        settings = root.model_validate(composed)
    except ValidationError as error:
        errors += [in_words(one, root, composed) for one in error.errors()]
    errors += _unusable_models(composed)
    if errors or settings is None:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        listed = "\n".join(f"  - {error}" for error in dict.fromkeys(errors))
        raise ConfigurationError(f"{count} in the configuration (preset {preset}):\n{listed}")
    return settings


def check_weights_file(model: str, weights: str) -> None:
    """Check that the local file of a model's weights is there. No remote address is asked.

    Args:
        model: The model's name, for the message.
        weights: The setting: random, hub, a local path or an address.

    Raises:
        ConfigurationError: There is no such file.
    """
    if (weights not in ("random", "hub") and not is_remote(weights)
            and not Path(weights).expanduser().is_file()):
        raise ConfigurationError(
            f"models.{model}.weights = {weights!r}: no such file; give a .pth or .safetensors "
            "file that every node can read, or 'hub' or 'random'")


def _plugin_files(folder: Path, preset: str, overrides: Sequence[str]) -> list[str]:
    """Return the plugins that the last override of them names, else those of the preset.

    A value that is no list of files gives none: it is reported where the settings are validated.
    """
    composed = compose(folder, preset)
    pairs = [pair for pair in map(key_and_value, overrides) if pair]
    lay_over(composed, [pair for pair in pairs if pair[0] == "plugins"])
    files = composed.get("plugins")
    are_texts = isinstance(files, list) and all(isinstance(file, str) for file in files)
    return typing.cast(list[str], files) if are_texts else []


def _choose(folder: Path, preset: str, choices: dict[str, list[str]]) -> dict[str, Any]:
    """Compose a preset with choices of groups.

    Args:
        folder: The folder of configurations.
        preset: The preset's name.
        choices: The chosen names by group.
    """
    known = groups(folder)
    method = next(iter(choices.get("attribution", [])), None)
    has_file = method in known.get("attribution", [])
    by_hydra = [f"{group}=[{','.join(names)}]" for group, names in choices.items()
                if group != "attribution"]
    composed = compose(folder, preset, by_hydra + ([f"attribution={method}"] if has_file else []))
    if method is not None and not has_file:  # a registered one that has no file of its own
        composed["attribution"] = {"method": method}
    elif method is not None:
        # What a preset sets for its own attribution is not meant for another one.
        own = compose(folder, preset).get("attribution")
        if not isinstance(own, dict) or own.get("method") != method:
            composed["attribution"] = compose(folder, f"attribution/{method}").get("attribution")
    for group, names in choices.items():
        if group == "attribution":
            continue
        # A preset may set values of a choice that the command line left out.
        entries = composed.get(field_of(group), {})
        for choice in known[group]:
            if choice not in names:
                entries.pop(choice, None)
    return composed


def _unusable_models(composed: dict[str, Any]) -> list[str]:
    """Return a sentence on each unknown architecture and each absent file of weights.

    Args:
        composed: The configuration, in which anything else may be wrong.
    """
    models = composed.get("models")
    errors = []
    for key, model in models.items() if isinstance(models, dict) else ():
        if not isinstance(model, dict):
            continue
        name, weights = model.get("architecture"), model.get("weights")
        if isinstance(name, str) and name != "lenet5":
            from impactx.models.backbones import UnknownArchitecture, check_architecture

            try:
                check_architecture(name)
            except UnknownArchitecture as error:
                errors.append(f"models.{key}.architecture = {name!r}: {error}")
        if isinstance(weights, str) and weights:
            try:
                check_weights_file(key, weights)
            except ConfigurationError as error:
                errors.append(str(error))
    return errors
