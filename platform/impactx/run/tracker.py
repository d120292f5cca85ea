"""What an experiment tells its tracker, whichever tracker that is: the protocols and their records.

`Tracker` and `Run` are the protocols that the rest of the package speaks. `impactx.tracking`
implements them with MLflow and `impactx.run.no_tracker` without any library; nothing here imports
either.

A run is identified by its key, a text that the caller chooses and that names the same piece of work
after a restart. Keys are unique in a tracker: they begin with the job's key, as in
`job/cifar10/lenet5/trial-3f2a`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

Status = Literal["FINISHED", "FAILED", "KILLED"]
# Writes files into the empty folder that it is given, and returns their paths.
ArtifactFiles = Callable[[Path], Sequence[Path]]
MAX_KEY = 250  # characters: MLflow's limit for the names of parameters, metrics and tags


class TrackingError(RuntimeError):
    """The tracker cannot be used; the message gives the reason and the remedy, and no password."""


@dataclass(frozen=True)
class RunIdentity:
    """The piece of work that a run stands for, as it is known before the work begins.

    Args:
        key: Names the run in its tracker, now and after a restart; see `check_key`.
        name: The run's name for people.
        parent: The key of the run that this one belongs to; None for a job's run.
        parameters: Settings, nested as they are; they become dotted names (`values.flatten`).
        tags: Texts, or values that are logged as their text.

    Raises:
        ValueError: One of the two keys cannot be searched for.
    """

    key: str
    name: str
    parent: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_key(self.key, self.parent)


@dataclass(frozen=True)
class FinalModel:
    """A trained model that is kept where it can be loaded and served by its name.

    Args:
        run_key: The key of the run that trained it.
        name: The parts of its name: data set, classifier, approach.
        weights: The fingerprint of its weights; the same weights are kept under a name only once.
        read_checkpoint: Returns the bytes of its checkpoint; called in the background.
        tags: What else is logged with it, as texts.
    """

    run_key: str
    name: tuple[str, ...]
    weights: str
    read_checkpoint: Callable[[], bytes]
    tags: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_key(self.run_key)


class Run(Protocol):
    """One piece of work in the tracker, such as a trial. As a context manager, it always ends.

    No method waits for a server, except `finish`. An exception inside the `with` block gives
    FAILED with the traceback; an interrupt (Ctrl-C, SIGTERM, SystemExit) gives KILLED; both are
    raised again.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers.

        A metric that the run already holds at this step, from before a restart for instance, is
        skipped. Give a final number another name than a curve: a table of runs shows the last point
        of `val_accuracy`, not its best.

        Args:
            metrics: The numbers by name.
            step: The epoch, counted from 1; None for numbers that describe the run as a whole.
        """

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Log the epochs so far; what the run already holds is skipped.

        A training that resumes from a checkpoint calls it, so that epochs between the last flush
        and a kill -9 are not missing.

        Args:
            history: One mapping per epoch. Row i is step i + 1, or its own "epoch" where it has
                one.
        """

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log settings, nested as they are; they become dotted names (`values.flatten`)."""

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, overwriting those of the same name."""

    def log_text(self, text: str, path: str) -> None:
        """Log a text as the artifact `path`."""

    def log_bytes(self, content: bytes, path: str) -> None:
        """Log bytes, such as those of a picture, as the artifact `path`."""

    def log_file(self, local_path: str | Path, folder: str = "") -> None:
        """Log a file as an artifact. It is read later: leave it unchanged until `finish`."""

    def finish(self, status: Status = "FINISHED", error: str | None = None) -> None:
        """End the run and wait until all of it is logged; a warning names what could not be.

        Args:
            status: The run's final status.
            error: The text of the error that ended it, a traceback for instance.
        """

    def __enter__(self) -> Run:
        """Return the run itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """End the run with the status that the block's end asks for."""


class Tracker(Protocol):
    """The place where runs are kept. It can be pickled, and so sent to the workers.

    `replay`, `register_model` and `died` return at once; their work is done in the background, at
    the latest by the end of `close_unfinished`.
    """

    def prepare(self) -> None:
        """Create what the tracker needs, once, in the driver.

        Raises:
            TrackingError: The tracker cannot be used.
        """

    def run(self, identity: RunIdentity) -> Run:
        """Begin a run, or continue the one with this key."""

    def replay(self, identity: RunIdentity, *, history: Sequence[Mapping[str, float]] = (),
               final: Mapping[str, float] | None = None,
               files: ArtifactFiles | None = None) -> None:
        """Create the FINISHED run of work whose result is there from earlier, unless it exists.

        Args:
            identity: The run's identity.
            history: One mapping per epoch, as for `Run.log_history`.
            final: Metrics of the run as a whole.
            files: Writes the run's artifacts; called only if the run has to be created.
        """

    def register_model(self, model: FinalModel) -> None:
        """Keep a final model where it can be loaded and served by its name."""

    def died(self, identity: RunIdentity, error: str) -> None:
        """Mark a run as FAILED whose process may have died before it could end it.

        A run that has ended is left as it is.

        Args:
            identity: The run's identity; a run that had not begun is created.
            error: The error as the driver knows it.
        """

    def close_unfinished(self, root_key: str) -> int:
        """At the job's end, mark its runs that are still RUNNING as KILLED.

        Args:
            root_key: The key of the job's run, the one without a parent.

        Returns:
            The number of runs that were marked.
        """

    def describe(self) -> list[str]:
        """Return lines for the user: how to look at what was logged."""


def check_key(*keys: str | None) -> None:
    """Refuse keys that MLflow's search cannot express; None stands for no key.

    Raises:
        ValueError: A key is empty, longer than MAX_KEY or holds a quote, a backslash or a newline.
    """
    for key in keys:
        if key is not None and (not key or len(key) > MAX_KEY or re.search(r"['\"`\\\n]", key)):
            raise ValueError(f"the run key {key!r}: 1 to {MAX_KEY} characters without quotes or "
                             "backslashes")
