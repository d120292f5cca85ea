"""What the maps of a model say: by it they are drawn, served and described."""

from __future__ import annotations

from typing import Literal

from torch import nn

MapKind = Literal["evidence", "attention"]


def map_kind(model: nn.Module, weight: float | None = None) -> MapKind | None:
    """evidence: signed, for and against the class; attention: in (0, 1), without a sign; None: it has no maps.

    weight: the lambda that it was trained with. None as well where that is 0: its decoder got no gradient, and what
    it makes of an image is as random as it was when it began.
    """
    return None if weight == 0 else getattr(model, "map_kind", None)
