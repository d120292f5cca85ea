"""Settings of the store of maps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from impactx.settings.base import Settings


class MapSettings(Settings):
    """How the store of maps is cut and scaled."""

    shard_size: int = Field(500, ge=1, description=(
        "Images in each Parquet file of a store. It is part of what identifies the store. Ours."))
    scale: Literal["std", "max_abs", "raw"] = Field("std", description=(
        "How maps are scaled for the decoder; the paper names no scale. std: all are divided by "
        "the standard deviation of the training maps; max_abs: each is divided by its largest "
        "absolute value, and a map of zeros stays one; raw: they are left as they are."))
