"""What the maps of a model say: by it they are drawn, served and described."""

from __future__ import annotations

from typing import Literal

from torch import nn

MapKind = Literal["evidence", "attention"]


def map_kind(model: nn.Module) -> MapKind | None:
    """evidence: signed, for and against the class; attention: in (0, 1), without a sign; None: it has no maps."""
    return getattr(model, "map_kind", None)
