"""Steps of kinds that no other part of the report knows, such as those of an extended flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from impactx.experiment.steps.maps import Maps
from impactx.experiment.steps.quality import MapQuality
from impactx.experiment.steps.test import Test
from impactx.experiment.steps.training import Model, Trial
from impactx.report.blocks import Section, Table, Text
from impactx.report.numbers import NONE, number
from impactx.report.results import named
from impactx.timing import duration

SHOWN_ELSEWHERE = {step.kind for step in (Trial, Model, Maps, Test, MapQuality)}


def other_sections(export: Mapping[str, Any]) -> list[Section]:
    """Return a table of the steps that stand nowhere else, with the plain values of their results.

    Args:
        export: Of `results.export`.
    """
    rows = [[named(cell), unit["role"], unit["name"], unit["state"], _values(unit["result"]),
             _time(unit["result"])]
            for cell in export["cells"] for unit in cell["units"]
            if unit["role"] not in SHOWN_ELSEWHERE]
    if not rows:
        return []
    head = ["cell", "kind", "step", "state", "result", "time"]
    return [Section("Other steps", [Table("other-steps", head, rows, frozenset({5})), Text(
        "Steps of the experiment that no other part of this page shows.", "note")])]


def _values(result: Mapping[str, Any] | None) -> str:
    """Return the numbers, texts and truth values of a result in one line."""
    plain = [f"{name} {number(value)}" for name, value in (result or {}).items()
             if name != "seconds" and isinstance(value, (bool, int, float, str))]
    return ", ".join(plain) or NONE


def _time(result: Mapping[str, Any] | None) -> str:
    return NONE if result is None else duration(result["seconds"])
