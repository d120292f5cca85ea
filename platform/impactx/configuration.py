"""From presets, groups and overrides to checked settings; every mistake is reported in one message.

Presets are the files in configs/, groups its folders.  Hydra composes them; values given as key=value are
laid over the result here, so that a wrong key is reported together with everything else that is wrong.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from impactx import plugins
from impactx.fetching import is_remote
from impactx.settings import ExperimentSettings, Settings, settable
from impactx.settings.extensions import attribution, registry_of, tagged
from impactx.settings.registry import UNKNOWN, UNNAMED

DEFAULT_PRESET = "full_grid"
Root = typing.TypeVar("Root", bound=Settings)


class ConfigurationError(ValueError):
    """The configuration is wrong; the message lists every error with its setting, value and remedy."""


def configs_folder(beside: str | Path | None = None) -> Path:
    """The folder of presets: beside a job's folder, else the one shipped in the package."""
    here = Path(__file__).resolve().parent
    candidates = [Path(beside).resolve().parent.parent / "configs"] if beside else []
    candidates += [here / "configs", here.parent.parent / "configs"]
    for folder in candidates:
        if (folder / f"{DEFAULT_PRESET}.yaml").is_file():
            return folder
    raise ConfigurationError(f"no configs found; looked in {', '.join(map(str, candidates))}")


def presets(folder: Path) -> list[str]:
    """Names of the presets in a configs folder."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def groups(folder: Path) -> dict[str, list[str]]:
    """Names of the groups and of their choices."""
    return {d.name: sorted(p.stem for p in d.glob("*.yaml")) for d in sorted(folder.iterdir())
            if d.is_dir() and any(d.glob("*.yaml"))}


def _similar(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


@typing.overload
def load_settings(preset: str = ..., overrides: Sequence[str] = ..., folder: str | Path | None = ...
                  ) -> ExperimentSettings: ...
@typing.overload
def load_settings(preset: str, overrides: Sequence[str], folder: str | Path | None, root: type[Root]) -> Root: ...
def load_settings(preset: str = DEFAULT_PRESET, overrides: Sequence[str] = (), folder: str | Path | None = None,
                  root: type[Settings] = ExperimentSettings) -> Settings:
    """Settings of a preset with overrides: group=choice, group=[choice,choice] or a.b.c=value (YAML values).

    root: what is wanted; of a preset, a job that needs less than an experiment takes what it knows.
    Raises ConfigurationError with all errors at once, and PluginError for a plugin that cannot be used.
    """
    folder = Path(folder) if folder else configs_folder()
    errors: list[str] = []
    if preset not in presets(folder):
        raise ConfigurationError(f"preset {preset!r} does not exist: {_similar(preset, presets(folder))}"
                                 f"there are {', '.join(presets(folder))} (in {folder})")
    plugins.load(_plugin_files(folder, preset, overrides))  # any setting can name what they register
    known = groups(folder)
    chosen: dict[str, list[str]] = {}  # by group; the last choice counts, as everywhere
    values = []
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip().lstrip("+")
        if not equals or not key:
            errors.append(f"{override!r}: write it as setting=value")
        elif (key := "attribution" if key == "attribution.method" else key) in known:
            wanted = [c.strip() for c in value.strip().strip("[]").split(",") if c.strip()]
            bad = [c for c in wanted if c not in known[key] and not (key == "attribution" and c in attribution.names())]
            errors += [f"{key} = {c!r}: no such choice; {_similar(c, known[key])}"
                       f"there are {', '.join(known[key])} (files in {folder / key})" for c in bad]
            if key == "attribution" and len(wanted) != 1:
                bad = wanted or [""]
                errors.append(f"attribution = {value.strip()!r}: give one of {', '.join(known[key])} (others, that "
                              "judge maps, are evaluation.attributions)")
            field = {"dataset": "datasets", "model": "models", "approach": "approaches"}.get(key, key)
            if field not in root.model_fields:
                errors.append(f"{key} = {value}: this job has no such setting; allowed here: "
                              f"{', '.join(root.model_fields)}")
            elif not bad:
                chosen[key] = wanted
        else:
            values.append((key, value))
    composed = _compose(folder, preset, [
        f"{key}={wanted[0]}" if key == "attribution" else f"{key}=[{','.join(wanted)}]"
        for key, wanted in chosen.items() if key != "attribution" or wanted[0] in known[key]])
    if "attribution" in chosen and chosen["attribution"][0] not in known["attribution"]:
        composed["attribution"] = {"method": chosen["attribution"][0]}  # registered, and without a file of its own
    elif "attribution" in chosen:
        _forget_other_attribution(composed, chosen["attribution"][0], folder, preset)
    for key, wanted in chosen.items():  # a preset may set values of a choice that the command line left out
        entries = composed.get({"dataset": "datasets", "model": "models", "approach": "approaches"}.get(key, ""), {})
        for choice in known[key]:
            if choice not in wanted:
                entries.pop(choice, None)
    composed = {name: value for name, value in composed.items()
                if name in root.model_fields or name not in ExperimentSettings.model_fields}
    errors += _lay_over(composed, values)
    settings = None
    try:
        settings = root.model_validate(composed)
    except ValidationError as error:
        errors += [_readable(e, root, composed) for e in error.errors()]
    errors += _unusable_models(composed)
    if errors or settings is None:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise ConfigurationError(f"{count} in the configuration (preset {preset}):\n" + "\n".join(
            f"  - {e}" for e in dict.fromkeys(errors)))
    return settings


def _plugin_files(folder: Path, preset: str, overrides: Sequence[str]) -> list[str]:
    """The plugins of the last override that names any, else the preset's; a value that is no such list is reported
    where the settings are checked."""
    composed: dict[str, Any] = _compose(folder, preset, [])
    named = [value for key, equals, value in (text.partition("=") for text in overrides)
             if equals and key.strip().lstrip("+") == "plugins"]
    _lay_over(composed, [("plugins", value) for value in named])
    files = composed.get("plugins")
    return files if isinstance(files, list) and all(isinstance(file, str) for file in files) else []


def _forget_other_attribution(composed: dict[str, Any], method: str, folder: Path, preset: str) -> None:
    """What a preset sets for its own attribution is not meant for the one that the command line chose."""
    own = _compose(folder, preset, []).get("attribution")
    if not isinstance(own, dict) or own.get("method") != method:
        composed["attribution"] = _compose(folder, f"attribution/{method}", []).get("attribution")


def check_weights_file(model: str, weights: str) -> None:
    """Raise ConfigurationError where a model's `weights` are a local file that is absent; no address is asked."""
    if weights not in ("random", "hub") and not is_remote(weights) and not Path(weights).expanduser().is_file():
        raise ConfigurationError(f"models.{model}.weights = {weights!r}: no such file; give a .pth or .safetensors "
                                 "file that every node can read, or 'hub' or 'random'")


def _unusable_models(composed: dict[str, Any]) -> list[str]:
    """Unknown architectures and absent weights, of whatever else is wrong with the settings."""
    models = composed.get("models")
    found = []
    for key, model in models.items() if isinstance(models, dict) else ():
        name, weights = (model.get("architecture"), model.get("weights")) if isinstance(model, dict) else (None, None)
        if isinstance(name, str) and name != "lenet5":
            from impactx.models.backbones import UnknownArchitecture, check_architecture

            try:
                check_architecture(name)
            except UnknownArchitecture as error:
                found.append(f"models.{key}.architecture = {name!r}: {error}")
        if isinstance(weights, str) and weights:
            try:
                check_weights_file(key, weights)
            except ConfigurationError as error:
                found.append(str(error))
    return found


def _compose(folder: Path, preset: str, chosen: list[str]) -> dict[str, Any]:
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        for path in sorted(folder.rglob("*.yaml")):
            _check_interpolations(yaml.safe_load(path.read_text(encoding="utf8")), str(path))
        with initialize_config_dir(str(folder.absolute()), version_base="1.3"):
            composed = compose(preset, overrides=chosen)
        _check_interpolations(OmegaConf.to_container(composed, resolve=False), f"preset {preset}")
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigurationError(f"preset {preset} cannot be composed: {error}") from error
    return typing.cast(dict[str, Any], plain)


# What a configuration may refer to: its own values, and variables of the environment that are meant for it.
_INTERPOLATION = re.compile(r"\$\{(?:[\w.]+|oc\.env:IMPACTX_\w+(?:,[^${}]*)?)\}")


def _check_interpolations(value: Any, where: str) -> None:
    """Raise ConfigurationError where a file refers to anything else: somebody else's file must not read a password.

    Both the files and what they compose are looked at: Hydra resolves the list of defaults before, and a file may
    bring in a folder of its own.
    """
    seen: set[int] = set()
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, str):
            for found in re.finditer(r"\$\{", node):
                if not _INTERPOLATION.match(node, found.start()):
                    raise ConfigurationError(
                        f"{where}: {node!r} may not stand in a configuration; allowed are ${{setting}} and "
                        "${oc.env:IMPACTX_NAME,default}")
        elif isinstance(node, (dict, list)) and id(node) not in seen:
            seen.add(id(node))
            left += [*node, *node.values()] if isinstance(node, dict) else node


def _lay_over(composed: dict[str, Any], values: list[tuple[str, str]]) -> list[str]:
    """Put a.b.c=value into the composed configuration; returns what could not be understood."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    errors = []
    for key, text in values:
        try:
            # OmegaConf's YAML reading: safe (no objects), 1e-3 is a number.
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index,call-overload]
        except (YAMLError, OmegaConfBaseException) as error:
            errors.append(f"{key} = {text!r}: not readable as YAML ({str(error).splitlines()[0]})")
            continue
        node: Any = composed
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                errors.append(f"{key}: {part!r} holds a value, not settings")
                break
        else:
            node[last] = value
    return errors


def _place(location: Sequence[Any], root: type[Settings], data: Any) -> tuple[list[Any], Any]:
    """Where an error is, as one would write it (without pydantic's own words), and the type of what is there.

    data: what was validated; of settings that may be of several classes, it tells which.
    """
    model: Any = root
    written: list[Any] = []
    for part in location:
        if str(part).startswith(("function-", "list[")):
            continue
        if part in (kinds := tagged(model)):
            model = kinds[part]
            continue
        written.append(part)
        if typing.get_origin(model) is typing.Annotated:
            model = typing.get_args(model)[0]
        if isinstance(model, type) and issubclass(model, BaseModel) and part in (fields := settable(model)):
            annotation = fields[part].annotation
        elif typing.get_origin(model) in (dict, list, tuple):
            annotation = typing.get_args(model)[0 if typing.get_origin(model) is tuple else -1]
        else:
            annotation = None
        if typing.get_origin(annotation) in (typing.Union, types.UnionType) and not tagged(annotation):
            annotation = next((a for a in typing.get_args(annotation) if a is not type(None)), None)
        data = _inside(data, part)
        registry = registry_of(annotation)
        name = _inside(data, registry.tag) or registry.default if registry is not None else None
        model = registry.get(name) if registry is not None and name in registry.names() else annotation
    return written, model


def _inside(data: Any, part: Any) -> Any:
    try:
        return data[part]
    except (TypeError, KeyError, IndexError):
        return None


def _readable(error: Any, root: type[Settings], data: Any) -> str:
    location, model = _place(error["loc"], root, data)
    where = ".".join(map(str, location)) or "the whole"
    if error["type"] == "extra_forbidden":
        _, parent = _place(error["loc"][:-1], root, data)
        fields = settable(parent) if isinstance(parent, type) and issubclass(parent, BaseModel) else {}
        chosen = next((f" with {name} {fields[name].default}" for name in ("method", "kind", "metric") if name in fields), "")
        return (f"{where} = {error['input']!r}: no such setting{chosen}; {_similar(str(location[-1]), list(fields))}"
                f"allowed here: {', '.join(fields) or 'nothing'}")
    if error["type"] == UNNAMED:
        return f"{where}.{error['msg']}"
    if error["type"] == UNKNOWN:
        return f"{where}.{error['ctx']['tag']} = {error['ctx']['value']!r}: {error['msg']}"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = error["ctx"]["discriminator"].strip("'")
        names = list(tagged(model))
        if error["type"] == "union_tag_not_found":
            return f"{where}.{tag} is missing; there are {', '.join(names)}"
        value = error["ctx"]["tag"]
        return f"{where}.{tag} = {value!r}: no such choice; {_similar(value, names)}there are {', '.join(names)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where} is missing"
    shown = repr(error["input"])
    return f"{where} = {shown if len(shown) < 100 else shown[:97] + '...'}: {message[0].lower()}{message[1:]}"
