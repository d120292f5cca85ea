"""Settings of the store of maps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from impactx.settings.base import Settings


class MapSettings(Settings):
    """How the store of maps is cut and scaled."""

    shard_size: int = Field(500, ge=1, description=(
        "images in each Parquet file; part of the store's layout"))
    scale: Literal["std", "max_abs", "raw"] = Field("std", description=(
        "std: divided by the training maps' standard deviation, one number for a store; max_abs: "
        "each map by its largest absolute value, a map of zeros stays one; raw: as they are"))
