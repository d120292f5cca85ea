"""What every step is: a frozen record, a key, and a function that makes its result.

A step is one piece of work that is kept. Its fields are what its numbers depend on, and its key is
the fingerprint of exactly these and of the code that computes them; a field that is marked
`OUTSIDE_KEY` says where something lies, or what people call it, and may differ between two records
of one step.

A new kind of step is a subclass of `Step` and one of `Result`. It is carried out, tracked, counted
by `--dry-run`, noted in the journal and listed in the report as every other kind is.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from impactx.code import CodeFingerprint, code_fingerprint
from impactx.settings.base import Settings
from impactx.storage import Storage
from impactx.timing import duration
from impactx.version import Environment

if TYPE_CHECKING:
    from impactx.experiment.workplace import Workplace

Plain = bool | int | float | str | None
Slot = Literal["trial", "training", "maps", "process"]
R = TypeVar("R", bound="Result")


class _OutsideKey:
    """Marks a field that is no part of a step's key."""


OUTSIDE_KEY = _OutsideKey()
Name = Annotated[str, OUTSIDE_KEY]


class StepError(RuntimeError):
    """A step cannot be done; the message names it and says what to do."""


class Record(Settings):
    """Base of what steps are made of: frozen, typed, nothing unknown in it."""


class Result(BaseModel):
    """What a finished step leaves: plain, typed values, kept as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    seconds: float
    """Of the process that did the step."""

    environments: tuple[Environment, ...] = ()
    """In which the numbers were computed: several where processes on different machines shared the
    work; of a training that went on elsewhere, the last one. Empty in results of earlier versions.
    """

    def metrics(self) -> dict[str, float]:
        """Return the numbers that MLflow's table of runs shows of the step."""
        return {name: float(value) for name, value in self.model_dump().items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)}


@dataclass(frozen=True)
class Context:
    """What a step has at hand in the process that does it.

    Attributes:
        place: Where artifacts, data sets and models of other steps lie.
        device: The torch device of this process.
        rank, world_size: Of the data-parallel workers that share a training.
        on_epoch: Called with the metrics of each epoch of a training, on rank 0. A true answer ends
            the training there, resumable.
        on_maps: Called after each shard of maps: maps made now, there before, and of all.
    """

    place: Workplace
    device: str = "cpu"
    rank: int = 0
    world_size: int = 1
    on_epoch: Callable[[dict[str, float]], object] | None = None
    on_maps: Callable[[int, int, int], None] | None = None


class Step(Record, abc.ABC, Generic[R]):
    """One piece of work whose result is kept under its key.

    Class attributes:
        kind: Names the kind, in the singular; artifacts lie in the folder of its plural.
        slot: What the step needs of a cluster: a trial's process, a training's workers, the actors
            that make maps, or one process.
        result_type: The class of its result.
        title: What people call a group of such steps.

    Attributes:
        reused_code: The digest of the other code under which the step was finished and is reused;
            None: it is done by today's.
    """

    kind: ClassVar[str]
    slot: ClassVar[Slot] = "process"
    result_type: ClassVar[type[Result]]
    title: ClassVar[str]

    name: Name
    dataset_name: Name
    model_name: Name
    approach_name: Annotated[str | None, OUTSIDE_KEY] = None
    repeat: Annotated[int, OUTSIDE_KEY] = 0
    reused_code: Annotated[str | None, OUTSIDE_KEY] = None

    @abc.abstractmethod
    def execute(self, context: Context) -> R:
        """Do the step and keep its files and its result; return the result.

        Raises:
            StepError: It cannot be done; trying again does not help.
        """

    @abc.abstractmethod
    def placeholder(self) -> R:
        """Return a result of the right shape, for counting what follows before the step is done."""

    def code_roots(self) -> set[str]:
        """Return the modules that the step's numbers begin in; what these import counts as well."""
        return {type(self).__module__}

    def parameters(self) -> dict[str, Any]:
        """Return what MLflow and the report show of the step, as plain data."""
        return {"dataset": self.dataset_name, "model": self.model_name, "repeat": self.repeat} | (
            {} if self.approach_name is None else {"approach": self.approach_name})

    def metrics(self, result: R) -> dict[str, float]:
        """Return the numbers that MLflow's table of runs shows of the finished step."""
        return result.metrics()

    def describe(self, result: R) -> str:
        """Return what the job's log says of the finished step."""
        return f"done in {duration(result.seconds)}"

    def tags(self, result: R, storage: Storage) -> dict[str, str]:
        """Return tags of the finished step's run in MLflow."""
        return {}

    def files(self, place: Workplace, folder: Path, result: R | None) -> list[Path]:
        """Return what the step's run in MLflow holds as files.

        Args:
            place: Where the step's artifacts lie.
            folder: Empty; files that are made for the purpose go here.
            result: Of the finished step; None before it is done.
        """
        record = folder / "step.json"
        record.write_text(json.dumps(
            {"kind": self.kind, "recipe": self.recipe, "code": self.code, "inputs": self.inputs()},
            indent=1, sort_keys=True))
        return [record]

    def complete(self, place: Workplace) -> bool:
        """Return whether all is there that a finished step left beside its result."""
        return True

    def inputs(self) -> dict[str, str]:
        """Return the folders of the steps that this one starts from, by what they are to it."""
        return {}

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The fields that belong to the key, as plain data."""
        return key_fields(self)

    @cached_property
    def code(self) -> str:
        """The digest of the code that computes the step's numbers."""
        return self.reused_code or self.todays_code.digest

    @property
    def todays_code(self) -> CodeFingerprint:
        """The code by which this process would compute the step's numbers."""
        return _code_of(frozenset(self.code_roots()))

    def check_code(self) -> None:
        """Check that this process computes by the code that the key holds.

        Raises:
            StepError: The code has changed since the job began.
        """
        if self.todays_code.digest != self.code:
            raise StepError(f"{self.name}: the code that computes it has changed since the job "
                            "began: start the same command again")

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits: the fingerprint of recipe and code."""
        return fingerprint({"kind": self.kind, "recipe": self.recipe, "code": self.code})

    @cached_property
    def recipe_key(self) -> str:
        """32 hexadecimal digits: the fingerprint of kind and recipe, whatever the code is."""
        return fingerprint({"kind": self.kind, "recipe": self.recipe})

    def finished_by(self, code: str) -> Self:
        """Return the same step as it was done by other code, whose digest is given."""
        other = self.model_copy(update={"reused_code": code})
        for name in ("code", "key"):  # a copy has the original's cached properties
            other.__dict__.pop(name, None)
        return other

    @property
    def folder(self) -> str:
        """Where the step's artifacts lie under the output's root."""
        return f"{plural(self.kind)}/{self.key}"


@cache
def _code_of(roots: frozenset[str]) -> CodeFingerprint:
    """Return the fingerprint of the code, as it was when this process first asked for it.

    A process computes by the code that it has imported: files that change later are not its code.
    """
    return code_fingerprint(roots)


def plural(kind: str) -> str:
    """Return the name of the folder of a kind of steps."""
    return kind if kind.endswith(("s", "quality")) else f"{kind}s"


def fingerprint(value: Any) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of plain data as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def key_fields(record: BaseModel) -> dict[str, Any]:
    """Return a record's fields as plain data, without those outside its key."""
    return {name: _plain(getattr(record, name)) for name, field in type(record).model_fields.items()
            if OUTSIDE_KEY not in field.metadata}


def _plain(value: Any) -> Any:
    # Settings with `described` know which of their fields change numbers.
    if hasattr(value, "described"):
        return value.described()
    if isinstance(value, BaseModel):
        return key_fields(value)
    if is_dataclass(value):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def local_file(storage: Storage, path: str, folder: Path) -> Path:
    """Return a stored file as a local one: where it lies, or a copy in the folder."""
    if not storage.remote:
        return Path(storage.uri(path))
    copy = folder / path.rpartition("/")[2]
    copy.write_bytes(storage.read(path))
    return copy
