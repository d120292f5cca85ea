"""What an approach is in the comparison.

The claim is that explanations make a difference. An approach that learns them is set against A,
against the same network that learns none (lambda = 0) and against one that learns the maps of other
images (shuffled).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RoleKind = Literal["a", "no_maps", "shuffled", "control", "explained", "other"]
CONTROLS: tuple[RoleKind, ...] = ("no_maps", "shuffled")
# How a sentence names what a gain is measured against.
REFERENCES: dict[RoleKind, str] = {
    "a": "A", "no_maps": "the same network with lambda = 0",
    "shuffled": "maps shuffled among the images"}


@dataclass(frozen=True)
class Role:
    """The part that an approach has in the comparison.

    Attributes:
        kind: "a": the classifier A; "no_maps": the network of an explained approach, with
            lambda = 0; "shuffled": taught the maps of other images; "control": taught other maps
            than the experiment's; "explained": taught the experiment's maps; "other": all else.
        candidates: Size of its own search. None for A, whose search is the grid.
        at_once: Whether all its modules are trained in a single stage (paper 3.3).
    """

    kind: RoleKind
    candidates: int | None = None
    at_once: bool = False

    def over(self, other: Role) -> str | None:
        """Return the name of the reference that `other` is for this role, or None if it is none.

        A control is trained as the approach that it controls: in a single stage where A's part
        learns too, in two stages where it is A's.
        """
        if other.kind == "explained":
            compared = self.kind == "explained" and self.at_once > other.at_once
            return "the same in two stages" if compared else None
        if other.kind != "a" and self.at_once != other.at_once:
            return None
        return REFERENCES.get(other.kind)
