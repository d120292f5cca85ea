"""What an approach is in the comparison: told by its settings, whatever its name.

The claim is that explanations make a difference.  An approach that learns them is set against A, against the same
network that learns none (lambda = 0) and against one that learns other images' (shuffled); see DESIGN section 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from impactx.experiment.plan import BASELINE

Kind = Literal["a", "no_maps", "shuffled", "control", "explained", "other"]
# How a sentence calls what a gain is measured against.
CONTROLS: tuple[Kind, ...] = ("no_maps", "shuffled")
REFERENCES: dict[Kind, str] = {"a": "A", "no_maps": "the same network with lambda = 0",
                               "shuffled": "maps shuffled among the images"}


@dataclass(frozen=True)
class Role:
    """kind: a; no_maps (lambda = 0); shuffled; control (taught other maps); explained (taught its own); other.

    candidates: how many its final one was chosen from, in a search of its own (A's is the grid, and not counted here);
    at_once: trained in a single stage (paper 3.3).
    """

    kind: Kind
    candidates: int | None = None
    at_once: bool = False

    def over(self, other: Role) -> str | None:
        """What a gain of this one over the other is a gain over; None where no such gain is asked for.

        Controls are trained as what they are controls of: in a single stage M learns too, in two it is A's.
        """
        if other.kind == "explained":
            return "the same in two stages" if self.kind == "explained" and self.at_once > other.at_once else None
        return REFERENCES.get(other.kind) if other.kind == "a" or self.at_once == other.at_once else None


def roles(settings: Mapping[str, Any]) -> dict[str, Role]:
    """By approach, A included. settings: an experiment's, as plain data."""
    found = {BASELINE: Role("a")}
    for name, approach in settings["approaches"].items():
        axes = (approach.get("lambdas"), approach.get("learning_rate_factors"))
        found[name] = Role(_kind(approach, settings["attribution"]), prod(len(axis) for axis in axes if axis),
                           approach["kind"] == "single_stage")
    return found


def _kind(approach: Mapping[str, Any], attribution: Mapping[str, Any]) -> Kind:
    if approach["kind"] not in ("impactx", "single_stage"):
        return "other"
    if not any(approach["lambdas"]):
        return "no_maps"
    taught = approach.get("maps", "own")
    if taught == "shuffled":
        return "shuffled"
    return "explained" if taught == "own" and approach.get("attribution") in (None, attribution) else "control"
