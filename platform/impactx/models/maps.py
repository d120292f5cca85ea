"""The kinds of maps that a model makes: by it they are drawn, served and described."""

from __future__ import annotations

from typing import Literal

from torch import nn

MapKind = Literal["evidence", "attention"]


def map_kind(model: nn.Module, weight: float | None = None) -> MapKind | None:
    """Return the kind of a model's maps, or None where it has none.

    "evidence" maps are signed, for and against the class; "attention" maps lie in (0, 1), without a
    sign.

    Args:
        model: The network.
        weight: The lambda that it was trained with. With 0 its decoder got no gradient, and what it
            makes of an image is as random as at the start: such a model has no maps.
    """
    return None if weight == 0 else getattr(model, "map_kind", None)
