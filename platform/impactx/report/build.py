"""From an exported job to the files of its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from impactx.report.blocks import Block, Figure, Items, Section, Table, Text
from impactx.report.classes import class_sections
from impactx.report.maps import Arrays, map_sections
from impactx.report.page import page
from impactx.report.repeat import repeat_sections
from impactx.report.results import controls, of_cell, sentences, table2
from impactx.report.search import search_sections
from impactx.report.steps import other_sections
from impactx.report.training import cost_sections, curve_sections
from impactx.results.export import export_job, map_scores
from impactx.run.tracker import Run
from impactx.storage import Storage

PAGE, FOLDER = "report.html", "report"


class ReportError(RuntimeError):
    """The report cannot be made; the message says what to do."""


def build_report(export: Mapping[str, Any], arrays: Callable[[str], Arrays | None]) -> dict[str, bytes]:
    """report.html, which holds all that follows, and each picture (PNG) and table (CSV) as a file, by their names.

    export: of experiment.export; arrays: the map_scores of the folder of a unit that judged maps. Raises ReportError
    where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ReportError("a report needs matplotlib, which is not installed: pip install 'impactx[explain]'"
                          ) from error
    settings = export["settings"]
    unreadable: list[str] = []
    with matplotlib.rc_context({"text.parse_math": False}):  # a class may be called "$5 note"
        sections = [*table2(export), *controls(export), *map_sections(export, arrays, unreadable),
                    *search_sections(export), *curve_sections(export), *class_sections(export),
                    *other_sections(export), *cost_sections(export), *repeat_sections(export)]
    head = Section("", [*sentences(export), *_gaps(export, unreadable)])
    under = [f"{', '.join(settings['datasets'])} × {', '.join(settings['models'])} · {settings['repeats']} "
             f"repeat{'s' if settings['repeats'] > 1 else ''} · job {export['job']}",
             f"Made {export['made'].replace('T', ' ').replace('+00:00', ' UTC')} by impactx"
             f"{_code(export)} from {export['output']}"]
    files = {PAGE: page(f"IMPACTX: {settings['name']}", under, [head], sections)}
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                files[block.name] = block.png
            elif isinstance(block, Table):
                files[f"{block.name}.csv"] = block.csv()
    return files


def _code(export: Mapping[str, Any]) -> str:
    code = export["starts"][-1].get("code") if export["starts"] else None
    return f" {code}" if code else ""


def _gaps(export: Mapping[str, Any], unreadable: list[str]) -> list[Block]:
    """What is not there (yet), in a box that cannot be missed. unreadable: lines on files that are damaged."""
    lines = [line for cell in (*export["cells"], *export["evidence"]["cells"])
             for line in of_cell(export, cell, cell["missing"])] + unreadable
    # The evidence was made from the same files, and says the same of a damaged one.
    return [Text("This job is not complete. What follows is what there is; missing:", "warning"),
            Items(list(dict.fromkeys(lines)), "warning")] if lines else []


def write_report(storage: Storage, job: str, *, to: Storage | None = None, run: Run | None = None) -> str:
    """Make a job's report from what it left and write it; returns the address of the page.

    to: where to write, by default jobs/<job>/report in the job's own output. run: the job's run, to which all of it is
    logged as well. Raises ReportError, StorageError.
    """
    files = build_report(export_job(storage, job), partial(map_scores, storage))
    target, folder = (storage, f"jobs/{job}/{FOLDER}/") if to is None else (to, "")
    for name, content in files.items():
        target.write(f"{folder}{name}", content)
        if run is not None:
            run.log_bytes(content, f"{FOLDER}/{name}")
    return target.uri(f"{folder}{PAGE}")
