"""From presets, groups of files and the command line to checked settings.

Presets are the files in configs/, groups are its folders. Hydra composes them (`files`). Values
that are given as setting=value are laid over the result (`overrides`), so that a wrong name is
reported together with everything else that is wrong, in sentences (`messages`).
"""

from impactx.configuration.files import (
    DEFAULT_PRESET,
    ConfigurationError,
    configs_folder,
    groups,
    presets,
)
from impactx.configuration.loading import check_weights_file, load_settings

__all__ = ["DEFAULT_PRESET", "ConfigurationError", "check_weights_file", "configs_folder", "groups",
           "load_settings", "presets"]
