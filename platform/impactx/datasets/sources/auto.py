"""The source that looks at what is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field

from impactx.datasets.sources.base import Location, Source, SourceFinder
from impactx.datasets.sources.folder import CLASS_FOLDERS, Folder, has_class_folders
from impactx.datasets.sources.parquet import PARQUET_FILES, Parquet, find_parquet
from impactx.datasets.sources.torchvision import Torchvision, TorchvisionClass
from impactx.settings.extensions import source


@source
class Auto(SourceFinder):
    """Parquet files if the data set's folder holds any, else class folders, else torchvision."""

    kind: Literal["auto"] = "auto"
    torchvision: TorchvisionClass | None = Field(None, description=(
        "The class of torchvision.datasets that is used if the folder holds neither Parquet files "
        "nor class folders, for instance CIFAR10."))
    download: bool = Field(True, description="Torchvision downloads the files that are absent.")

    def open(self, location: Location) -> Source:
        """Return the first of the sources that finds its files at a location.

        Raises:
            DataError: None does, and no class of torchvision is named.
        """
        location.check_path()
        if find_parquet(location.folder) is not None:
            return Parquet().open(location)
        if has_class_folders(location.folder):
            return Folder().open(location)
        if self.torchvision is None:
            raise location.absent(
                [PARQUET_FILES, CLASS_FOLDERS],
                "or name a class of torchvision, source={kind: auto, torchvision: CIFAR10}")
        # `path` is the folder that was just looked at, and not torchvision's.
        return self._torchvision(self.torchvision).open(replace(location, path_given=False))

    def offline(self) -> Self:
        """Return the same source, which lets torchvision download nothing."""
        if self.torchvision is None:
            return self
        return self.model_copy(update={"download": False})

    def remote_folders(self, name: str) -> list[tuple[str, SourceFinder]]:
        """Return the data set's own folder, then torchvision's."""
        return [(name, self)] + (
            [] if self.torchvision is None
            else self._torchvision(self.torchvision).remote_folders(name))

    def published_as(self) -> str | None:
        """Return the class of torchvision: files beside it hold the same data set."""
        return self.torchvision

    def _torchvision(self, dataset: str) -> Torchvision:
        return Torchvision(dataset=dataset, download=self.download)
