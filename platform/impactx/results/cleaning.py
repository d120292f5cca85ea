"""What an output holds that nothing leads to any more: listed by code, job and age, and deleted.

A step is reached from the journals of the jobs that name it, and from jobs/explain.py's notes. A
step of other code than today's is not found again by a job that is started today, though the report
of an earlier job may still show it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from impactx.code import code_fingerprint
from impactx.experiment.artifacts import OWNER, RESULT, read_record
from impactx.experiment.history import CODE, RECIPES, code_of
from impactx.results.records import CELLS, EXPLAINED, CellRecord
from impactx.storage import DamagedError, Storage

KEY = re.compile(r"[0-9a-f]{32}")
DAY, UNDER_WAY = 86400, 3600  # seconds; what was written within the last hour may be under way


@dataclass(frozen=True)
class Leftover:
    """A step's folder that may be deleted.

    Attributes:
        folder: Under the output's root.
        bytes, seconds: Size of its files, and since when none was written.
        code: Digest of the code that finished it; "" where it is unfinished.
        todays: Whether that is today's code; None where today's cannot be known, because the
            modules of an extension are not found here.
        jobs: The jobs that name it.
    """

    folder: str
    bytes: int
    seconds: float
    code: str
    todays: bool | None
    jobs: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why it is listed."""
        return f"named by {', '.join(self.jobs)}" if self.jobs else "named by no job"


@dataclass(frozen=True)
class Leftovers:
    """What may be deleted, and what is left alone: reasons by folder or job."""

    steps: Sequence[Leftover]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        groups: defaultdict[tuple[str, str, str], list[Leftover]] = defaultdict(list)
        for step in self.steps:
            code = "unfinished" if not step.code else f"code {step.code[:12]} ({_todays(step)})"
            groups[step.reason, code, step.folder.partition("/")[0]].append(step)
        lines: list[str] = []
        above: tuple[str, str] | None = None
        for (reason, code, kind), steps in sorted(groups.items()):
            if above != (above := (reason, code)):
                lines.append(f"{reason}, {code}:")
            oldest = max(step.seconds for step in steps) / DAY
            lines.append(f"  {kind:<12} {len(steps):>6} {_size(steps):>10}   up to {oldest:.0f} "
                         "days old")
        lines += [f"left alone: {what}: {reason}" for what, reason in self.skipped.items()]
        lines.append(f"in all: {len(self.steps)} steps, {_size(self.steps)}")
        return "\n".join(lines)


def _todays(step: Leftover) -> str:
    return {True: "today's", False: "not today's", None: "its extension is not here"}[step.todays]


def _size(steps: Iterable[Leftover]) -> str:
    size = sum(step.bytes for step in steps)
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def leftovers(storage: Storage, *, code: str | None = None, job: str | None = None,
              older_than: float = 0) -> Leftovers:
    """Return what nothing leads to any more.

    Args:
        storage: The output.
        code: "other": steps of other code than today's; or how a digest begins; both also where an
            earlier job still names them. None: by their names alone.
        job: Steps that this job names and no other does. None: steps that no job names; with
            `code`, of all jobs.
        older_than: Days since the last file of a step was written.

    Raises:
        StorageError: The storage does not answer, or a journal is damaged: what it names is then
            not known, and nothing may be called unreachable.
    """
    names, running = _named(storage), _running(storage)
    skipped = {f"the steps of {key}": reason for key, reason in running.items()}
    today: dict[str, bool | None] = {}
    steps = []
    for folder, files in _folders(storage).items():
        size, written = sum(s for s, _ in files.values()), max(t for _, t in files.values())
        age = time.time() - written / 1e9
        jobs = names.get(folder, frozenset())
        digest = _code(storage, folder) if RESULT in files else ""
        if digest not in today:
            today[digest] = is_todays(storage, digest) if digest else True
        step = Leftover(folder, size, age, digest, today[digest], tuple(sorted(jobs)))
        if age < older_than * DAY or not _chosen(step, code, job) or jobs & running.keys():
            continue
        if running and not jobs:
            skipped["steps that no job names"] = "a job that is under way may still come to them"
        elif OWNER in files and (owner := _owner(storage, f"{folder}/{OWNER}")):
            skipped[folder] = owner
        elif RESULT not in files and age < UNDER_WAY:
            skipped[folder] = "it is not finished, and was written within the last hour"
        else:
            steps.append(step)
    return Leftovers(steps, skipped)


def _chosen(step: Leftover, code: str | None, job: str | None) -> bool:
    if code == "other" and step.todays is not False:
        return False
    if code not in (None, "other") and not step.code.startswith(str(code)):
        return False
    if job is not None:
        return step.jobs == (job,)
    return not step.jobs or code is not None


def delete(storage: Storage, steps: Iterable[Leftover]) -> None:
    """Delete steps, and what is known of them.

    Raises:
        StorageError: Something cannot be deleted.
    """
    keys = set()
    for step in steps:
        # First what makes it finished, so that half a step is never taken for a whole one.
        storage.delete(f"{step.folder}/{RESULT}")
        storage.delete_folder(step.folder)
        keys.add(step.folder.rpartition("/")[2])
    codes = set()
    for name in storage.names(RECIPES):
        _, digest, key = name.split(".")
        if key in keys:
            storage.delete(f"{RECIPES}/{name}")
        else:
            codes.add(digest)
    for name in storage.names(CODE):
        if name.removesuffix(".json") not in codes:
            storage.delete(f"{CODE}/{name}")


def is_todays(storage: Storage, digest: str) -> bool | None:
    """Return whether the modules of a version of the code are still what they were.

    None where that cannot be known: a module of an extension is not found here.
    """
    modules = code_of(storage, digest).modules
    roots = []
    for module in modules:
        try:
            code_fingerprint([module])
        except ModuleNotFoundError:
            if module.partition(".")[0] != "impactx":
                return None
        else:
            roots.append(module)
    return bool(roots) and code_fingerprint(roots).digest == digest


def _folders(storage: Storage) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the files of every step's folder: sizes and times by name."""
    steps: defaultdict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for kind in storage.folders(""):
        if kind in ("jobs", CODE, RECIPES, EXPLAINED):
            continue
        for path, facts in storage.files(kind).items():
            key, _, name = path.partition("/")
            if KEY.fullmatch(key) and name:
                steps[f"{kind}/{key}"][name] = facts
    return dict(sorted(steps.items()))


def _named(storage: Storage) -> dict[str, frozenset[str]]:
    """Return which jobs name each step's folder."""
    named: defaultdict[str, set[str]] = defaultdict(set)
    for job in storage.folders("jobs"):
        for name in storage.names(f"jobs/{job}/{CELLS}"):
            record = read_record(storage, f"jobs/{job}/{CELLS}/{name}", CellRecord)
            for step in record.steps:
                for folder in (step.folder, *step.inputs.values()):
                    named[folder].add(job)
    for name in storage.names(EXPLAINED):
        named[f"maps/{name.removesuffix('.json')}"].add("jobs/explain.py")
    return {folder: frozenset(jobs) for folder, jobs in named.items()}


def _code(storage: Storage, folder: str) -> str:
    with contextlib.suppress(FileNotFoundError, DamagedError, AttributeError):
        return str(storage.read_json(f"{folder}/{RESULT}").get("code", ""))
    return ""


def _running(storage: Storage) -> dict[str, str]:
    """Return the jobs that are, or may be, under way, each with its reason."""
    jobs = {job: _owner(storage, f"jobs/{job}/driver.json") for job in storage.folders("jobs")}
    return {job: reason for job, reason in jobs.items() if reason}


def _owner(storage: Storage, path: str) -> str:
    """Return who may be writing there, or ""."""
    try:
        owner = storage.read_json(path)
        host, process, since = owner["host"], int(owner["process"]), owner["since"]
    except FileNotFoundError:
        return ""
    except (DamagedError, KeyError, TypeError, ValueError):
        return f"{storage.uri(path)} cannot be read"
    if host != socket.gethostname():
        return (f"process {process} on {host} owns it since {since}; if that process is gone, "
                f"delete {storage.uri(path)}")
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return f"process {process} works on it since {since}"
