"""What the command line changes: choices of groups and values of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from impactx.configuration.files import groups
from impactx.configuration.messages import did_you_mean
from impactx.settings import Settings
from impactx.settings.extensions import attribution

# The settings that hold the choices of a group, if their name is not the group's own.
_FIELDS = {"dataset": "datasets", "model": "models", "approach": "approaches"}


@dataclass
class Overrides:
    """The overrides of a command line.

    Attributes:
        choices: The names that are chosen of each group; the last choice of a group counts.
        values: Pairs of a setting's dotted name and its value as YAML text, in their order.
        errors: A sentence on each override that cannot be understood.
    """

    choices: dict[str, list[str]] = field(default_factory=dict)
    values: list[tuple[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def field_of(group: str) -> str:
    """Return the name of the setting that holds a group's choices."""
    return _FIELDS.get(group, group)


def key_and_value(override: str) -> tuple[str, str] | None:
    """Split "setting=value"; None for a text that is no override."""
    key, equals, value = override.partition("=")
    key = key.strip().lstrip("+")
    return (key, value) if equals and key else None


def read_overrides(overrides: Sequence[str], folder: Path, root: type[Settings]) -> Overrides:
    """Sort overrides into choices of groups and values of settings.

    Args:
        overrides: group=choice, group=[choice,choice] or a.b.c=value.
        folder: The folder of configurations.
        root: The class of the job's settings.
    """
    result, known = Overrides(), groups(folder)
    for override in overrides:
        parsed = key_and_value(override)
        if parsed is None:
            result.errors.append(f"{override!r}: write it as setting=value")
            continue
        key, value = parsed
        group = "attribution" if key == "attribution.method" else key
        if group in known:
            _read_choice(result, group, value, known[group], folder, root)
        else:
            result.values.append((key, value))
    return result


def _read_choice(result: Overrides, group: str, value: str, files: list[str], folder: Path,
                 root: type[Settings]) -> None:
    names = [name.strip() for name in value.strip().strip("[]").split(",") if name.strip()]
    registered = attribution.names() if group == "attribution" else []
    unknown = [name for name in names if name not in files and name not in registered]
    result.errors += [f"{group} = {name!r}: no such choice; {did_you_mean(name, files)}"
                      f"there are {', '.join(files)} (files in {folder / group})"
                      for name in unknown]
    wrong_number = group == "attribution" and len(names) != 1
    if wrong_number:
        result.errors.append(
            f"attribution = {value.strip()!r}: give one of {', '.join(files)} (others, that "
            "judge maps, are evaluation.attributions)")
    if field_of(group) not in root.model_fields:
        result.errors.append(f"{group} = {value}: this job has no such setting; allowed here: "
                             f"{', '.join(root.model_fields)}")
    elif not unknown and not wrong_number:
        result.choices[group] = names


def lay_over(composed: dict[str, Any], values: Sequence[tuple[str, str]]) -> list[str]:
    """Put values into a composed configuration, in place.

    Args:
        composed: The plain data of a preset.
        values: Pairs of a dotted name and YAML text.

    Returns:
        A sentence on each value that cannot be understood.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    errors = []
    for key, text in values:
        try:
            # OmegaConf reads YAML safely (it makes no objects), and takes 1e-3 for a number.
            whole: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
        except (YAMLError, OmegaConfBaseException) as error:
            first_line = str(error).splitlines()[0]
            errors.append(f"{key} = {text!r}: not readable as YAML ({first_line})")
            continue
        node: Any = composed
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                errors.append(f"{key}: {part!r} holds a value, not settings")
                break
        else:
            node[last] = whole["value"]
    return errors
