"""The errors of attributions; a message names the image or setting, the reason and the remedy."""

from __future__ import annotations

# Packages that impactx's own extra `explain` installs, by their import names.
IN_EXTRA = frozenset({"captum", "cv2", "matplotlib", "shap"})


class AttributionError(ValueError):
    """An attribution cannot make a map of this model and image."""


class MissingPackage(AttributionError):
    """A package that an attribution needs is not installed.

    Args:
        package: The package's import name.
        method: The attribution's name.
    """

    def __init__(self, package: str, method: str) -> None:
        install = "'impactx[explain]'" if package in IN_EXTRA else package
        super().__init__(f"attribution {method} needs the package {package}, which is not "
                         f"installed: pip install {install} (on every node that explains)")
