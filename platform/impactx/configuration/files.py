"""The files in configs/: where they are, what there is, and how Hydra composes them."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEFAULT_PRESET = "full_grid"
PACKAGE = Path(__file__).resolve().parents[1]
# What a configuration may refer to: its own values, and variables of the environment that are
# meant for it.
_INTERPOLATION = re.compile(r"\$\{(?:[\w.]+|oc\.env:IMPACTX_\w+(?:,[^${}]*)?)\}")


class ConfigurationError(ValueError):
    """The configuration is wrong; the message lists each error with its setting and remedy."""


def configs_folder(beside: str | Path | None = None) -> Path:
    """Return the folder of presets.

    Args:
        beside: A job's file. The folder configs/ beside the job's folder comes first.

    Returns:
        That folder; else the one that is installed in the package; else that of the repository.

    Raises:
        ConfigurationError: None of them holds presets.
    """
    candidates = [Path(beside).resolve().parent.parent / "configs"] if beside else []
    candidates += [PACKAGE / "configs", PACKAGE.parent.parent / "configs"]
    for folder in candidates:
        if (folder / f"{DEFAULT_PRESET}.yaml").is_file():
            return folder
    raise ConfigurationError(f"no configs found; looked in {', '.join(map(str, candidates))}")


def presets(folder: Path) -> list[str]:
    """Return the names of the presets in a folder of configurations."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def groups(folder: Path) -> dict[str, list[str]]:
    """Return the names of the choices of each group in a folder of configurations."""
    return {group.name: sorted(path.stem for path in group.glob("*.yaml"))
            for group in sorted(folder.iterdir()) if group.is_dir() and any(group.glob("*.yaml"))}


def compose(folder: Path, preset: str, choices: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plain data of a preset.

    Args:
        folder: The folder of configurations.
        preset: A file in it, without its ending.
        choices: Hydra's overrides of groups, such as "model=[lenet5]".

    Raises:
        ConfigurationError: A file cannot be read, or refers to something that it may not.
    """
    import yaml
    from hydra import compose as compose_by_hydra
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        # Both the files and what they compose are checked: Hydra resolves the list of defaults
        # before it composes, and a file may bring in a folder of its own.
        for path in sorted(folder.rglob("*.yaml")):
            _check_interpolations(yaml.safe_load(path.read_text(encoding="utf8")), str(path))
        with initialize_config_dir(str(folder.absolute()), version_base="1.3"):
            composed = compose_by_hydra(preset, overrides=list(choices))
        _check_interpolations(OmegaConf.to_container(composed, resolve=False), f"preset {preset}")
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigurationError(f"preset {preset} cannot be composed: {error}") from error
    return typing.cast(dict[str, Any], plain)


def _check_interpolations(value: Any, origin: str) -> None:
    """Check what the texts in plain data refer to: a foreign file must not read a password.

    Args:
        value: Mappings, lists and texts; they may contain themselves.
        origin: The file or preset, for the message.

    Raises:
        ConfigurationError: A text refers to more than settings and variables IMPACTX_*.
    """
    visited: set[int] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            for reference in re.finditer(r"\$\{", node):
                if not _INTERPOLATION.match(node, reference.start()):
                    raise ConfigurationError(
                        f"{origin}: {node!r} may not stand in a configuration; allowed are "
                        "${setting} and ${oc.env:IMPACTX_NAME,default}")
        elif isinstance(node, (dict, list)) and id(node) not in visited:
            visited.add(id(node))
            pending += [*node, *node.values()] if isinstance(node, dict) else node
