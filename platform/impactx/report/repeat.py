"""Everything that is needed to repeat the job."""

from __future__ import annotations

import json

from impactx.report.blocks import Block, Code, Section, Table, Text
from impactx.report.numbers import NONE
from impactx.results.export import JobExport


def repeat_sections(export: JobExport) -> list[Section]:
    """Return the commands, the versions, the machine and the settings.

    Args:
        export: The job.
    """
    starts = export.record.starts
    blocks: list[Block] = []
    if commands := list(dict.fromkeys(start.command for start in starts if start.command)):
        blocks += [Text("The command, to be run from the root of the repository. If it is given "
                        "again, it computes only what is missing:"), Code("\n".join(commands))]
    if starts:
        blocks.append(Table("starts", ["started (UTC)", "code", "machine"], [
            [start.time.replace("+00:00", "").replace("T", " "), start.code or NONE,
             start.machine or NONE] for start in starts]))
    if starts and (versions := starts[-1].versions):
        listed = ", ".join(f"{package} {version}" for package, version in versions.items())
        blocks.append(Text(f"With {listed}; constraints.txt pins them all.", "note"))
    blocks.append(Code(json.dumps(export.record.settings, indent=1),
                       closed="All settings of the job"))
    return [Section("To repeat it", blocks)]
