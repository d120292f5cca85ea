"""Steps of kinds that no other part of the report shows, such as those of an extended flow."""

from __future__ import annotations

from impactx.experiment.steps.base import Result
from impactx.report.blocks import Section, Table, Text
from impactx.report.numbers import NONE, number
from impactx.report.results import title
from impactx.results.export import RESULT_TYPES, JobExport, OtherResult
from impactx.timing import duration


def other_sections(export: JobExport) -> list[Section]:
    """Return a table of the steps that stand nowhere else, with the plain values of their results.

    Args:
        export: The job.
    """
    rows = [[title(cell), step.kind, step.name, step.state, _values(step.result),
             NONE if step.result is None else duration(step.result.seconds)]
            for cell in export.cells for step in cell.steps if step.kind not in RESULT_TYPES]
    if not rows:
        return []
    head = ["cell", "kind", "step", "state", "result", "time"]
    return [Section("Other steps", [Table("other-steps", head, rows, frozenset({5})), Text(
        "Steps of the experiment that no other part of this page shows.", "note")])]


def _values(result: Result | None) -> str:
    """Return the numbers, texts and truth values of a result in one line."""
    if not isinstance(result, OtherResult):
        return NONE
    plain = [f"{name} {number(value)}" for name, value in result.values.items()
             if isinstance(value, (bool, int, float, str))]
    return ", ".join(plain) or NONE
