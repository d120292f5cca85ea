"""From an exported job to the files of its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from impactx.report.blocks import Block, Figure, Items, Table, Text
from impactx.report.classes import class_sections
from impactx.report.maps import Arrays, map_sections
from impactx.report.page import page
from impactx.report.repeat import repeat_sections
from impactx.report.results import controls, of_cell, sentences, table2
from impactx.report.search import search_sections
from impactx.report.steps import other_sections
from impactx.report.training import cost_sections, curve_sections
from impactx.results.evidence_records import CellEvidence
from impactx.results.export import CellExport, JobExport, export_job, map_scores
from impactx.run.tracker import Run
from impactx.storage import Storage

PAGE, FOLDER = "report.html", "report"


class ReportError(RuntimeError):
    """The report cannot be made; the message says what to do."""


def build_report(export: JobExport, arrays: Callable[[str], Arrays | None]) -> dict[str, bytes]:
    """Return the files of a report, by their names.

    Args:
        export: The job.
        arrays: Returns the arrays that a judgement of maps left, by the step's folder; None where
            they are gone. See `results.export.map_scores`.

    Returns:
        report.html, which holds all of the report, and each of its pictures (PNG) and tables (CSV).

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError("a report needs matplotlib, which is not installed: "
                          "pip install 'impactx[explain]'") from error
    unreadable: list[str] = []
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called "$5 note"
        sections = [*table2(export), *controls(export), *map_sections(export, arrays, unreadable),
                    *search_sections(export), *curve_sections(export), *class_sections(export),
                    *other_sections(export), *cost_sections(export), *repeat_sections(export)]
    files = {PAGE: page(f"IMPACTX: {export.settings.name}", _under(export),
                        [*sentences(export), *_gaps(export, unreadable)], sections)}
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                files[block.name] = block.png
            elif isinstance(block, Table):
                files[f"{block.name}.csv"] = block.csv()
    return files


def _under(export: JobExport) -> list[str]:
    """Return the lines below the title."""
    settings, starts = export.settings, export.record.starts
    plural = "s" if settings.repeats > 1 else ""
    code = f" {starts[-1].code}" if starts and starts[-1].code else ""
    made = export.made.replace("T", " ").replace("+00:00", " UTC")
    return [f"{', '.join(settings.datasets)} × {', '.join(settings.models)} · "
            f"{settings.repeats} repeat{plural} · job {export.job}",
            f"Made {made} by impactx{code} from {export.output}"]


def _gaps(export: JobExport, unreadable: Sequence[str]) -> list[Block]:
    """Return what is missing, in a box that stands out; nothing where the job is complete.

    Args:
        export: The job.
        unreadable: Sentences on files that are damaged.
    """
    cells: list[CellExport | CellEvidence] = [*export.cells, *export.evidence.cells]
    lines = [line for cell in cells for line in of_cell(export, cell, cell.missing)]
    if not lines and not unreadable:
        return []
    # The evidence was made from the same files, and says the same of a damaged one.
    return [Text("This job is not complete. The page shows all results that exist; missing:",
                 "warning"),
            Items(list(dict.fromkeys([*lines, *unreadable])), "warning")]


def write_report(storage: Storage, job: str, *, to: Storage | None = None, run: Run | None = None
                 ) -> str:
    """Make the report of a job from what the job left, and write it.

    Args:
        storage: The job's output.
        job: The job's key.
        to: Where to write; by default jobs/<job>/report in the job's output.
        run: The job's run, to which all files are logged as well.

    Returns:
        The address of the page.

    Raises:
        ReportError: matplotlib is not installed.
        StorageError: The job's own file is damaged, or a storage does not answer.
    """
    files = build_report(export_job(storage, job), partial(map_scores, storage))
    target, folder = (storage, f"jobs/{job}/{FOLDER}/") if to is None else (to, "")
    for name, content in files.items():
        target.write(f"{folder}{name}", content)
        if run is not None:
            run.log_bytes(content, f"{FOLDER}/{name}")
    return target.uri(f"{folder}{PAGE}")
