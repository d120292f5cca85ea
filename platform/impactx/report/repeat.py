"""Everything that is needed to do the job again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from impactx.report.blocks import Block, Code, Section, Table, Text
from impactx.report.numbers import NONE


def repeat_sections(export: Mapping[str, Any]) -> list[Section]:
    """Commands, versions, machine, settings."""
    starts = export["starts"]
    last = starts[-1] if starts else {}
    blocks: list[Block] = []
    if commands := list(dict.fromkeys(start["command"] for start in starts if start.get("command"))):
        blocks += [Text("The command, run from the repository's root; given again, it computes only what is missing:"),
                   Code("\n".join(commands))]
    if starts:
        blocks.append(Table("starts", ["started (UTC)", "code", "machine"], [
            [start["time"].replace("+00:00", "").replace("T", " "), start.get("code", NONE),
             start.get("machine", NONE)] for start in starts]))
    if versions := last.get("versions"):
        blocks.append(Text("With " + ", ".join(f"{package} {version}" for package, version in versions.items())
                           + "; constraints.txt pins them all.", "note"))
    blocks.append(Code(json.dumps(export["settings"], indent=1), closed="All settings of the job"))
    return [Section("To repeat it", blocks)]
