"""Under which code steps were finished: why one is made again, and which may be reused.

    code/<digest>.json                      hashes of the modules of one version of the code
    recipes/<kind and recipe>.<code>.<key>  empty: a step of this recipe was finished by this code

Both are written as a step is finished. One listing of `recipes` tells what was finished earlier, so
no result has to be opened for it, wherever the output lies.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from impactx.code import CodeFingerprint, explain_difference
from impactx.experiment.steps.base import Step
from impactx.storage import DamagedError, Storage

if TYPE_CHECKING:
    from impactx.experiment.workplace import Workplace

S = TypeVar("S", bound=Step[Any])
CODE, RECIPES = "code", "recipes"


def keep_code(storage: Storage, step: Step[Any]) -> None:
    """Write down what the code consists of that a step is done by."""
    code = step.todays_code
    if not storage.exists(path := _path(code.digest)):
        storage.write_json(path, {"modules": dict(code.modules)})


def note_finished(storage: Storage, step: Step[Any]) -> None:
    """Write down that a step is finished, for later versions of the code."""
    storage.write(f"{RECIPES}/{step.recipe_key}.{step.code}.{step.key}", b"")


def code_of(storage: Storage, digest: str) -> CodeFingerprint:
    """Return what a version of the code consists of; without modules where nobody knows any more.

    Raises:
        StorageError: The storage does not answer.
    """
    try:
        return CodeFingerprint(digest, storage.read_json(_path(digest))["modules"])
    except (FileNotFoundError, DamagedError, KeyError, TypeError):
        return CodeFingerprint(digest, {})


def _path(digest: str) -> str:
    return f"{CODE}/{digest}.json"


class History:
    """What was finished when it is first asked; what is finished later is not looked for.

    Args:
        storage: The output.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._codes: dict[str, CodeFingerprint] = {}

    @cached_property
    def _finished(self) -> dict[str, dict[str, str]]:
        """Keys of finished steps by the code, by the fingerprint of kind and recipe."""
        finished: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for name in self._storage.names(RECIPES):
            parts = name.split(".")
            if len(parts) == 3:
                finished[parts[0]][parts[1]] = parts[2]
        return dict(finished)

    def other_codes(self, step: Step[Any]) -> list[str]:
        """Return digests of the code by which a step was finished; none if by today's, too."""
        codes = self._finished.get(step.recipe_key, {})
        return [] if step.code in codes else sorted(codes)

    def difference(self, step: Step[Any]) -> str:
        """Return which code differs since a step was finished; "" where it was not.

        Of several versions of the code, the one counts that differs in the fewest modules.
        """
        others = self._nearest_first(step)
        return self._explained(others[0], step) if others else ""

    def _nearest_first(self, step: Step[Any]) -> list[str]:
        new = set(step.todays_code.modules.items())
        return sorted(self.other_codes(step),
                      key=lambda digest: len(new ^ set(self._code(digest).modules.items())))

    def _explained(self, digest: str, step: Step[Any]) -> str:
        old = self._code(digest)
        return explain_difference(old, step.todays_code) if old.modules else (
            "the code differs, in which modules is not known any more")

    def _code(self, digest: str) -> CodeFingerprint:
        if digest not in self._codes:
            self._codes[digest] = code_of(self._storage, digest)
        return self._codes[digest]

    def reusable(self, step: S, place: Workplace) -> S:
        """Return a step as other code finished it, if today's has not; else the step itself.

        Args:
            step: As today's code would do it.
            place: Where steps leave what they make.

        Raises:
            StorageError: The storage does not answer.
        """
        for digest in self._nearest_first(step):
            other = step.finished_by(digest)
            # An earlier version may have kept results of another shape.
            with contextlib.suppress(DamagedError):
                if place.artifacts.result(other) is not None and other.complete(place):
                    return other
        return step

    def made_again(self, steps: Iterable[Step[Any]]) -> str:
        """Return one sentence on the steps that are made again because of their code, or ""."""
        return _sentence("made again", [self.difference(step) for step in steps])

    def reused(self, steps: Iterable[Step[Any]]) -> str:
        """Return one sentence on the steps of other code that are reused all the same, or ""."""
        return _sentence("reused", [self._explained(step.reused_code, step) for step in steps
                                    if step.reused_code])


def _sentence(what: str, reasons: Iterable[str]) -> str:
    counted = Counter(filter(None, reasons))
    if not counted:
        return ""
    parts = [reason if len(counted) == 1 else f"{reason} ({count})"
             for reason, count in counted.items()]
    steps_are = "step is" if counted.total() == 1 else "steps are"
    return f"{counted.total()} finished {steps_are} {what}, {'; '.join(parts)}"
