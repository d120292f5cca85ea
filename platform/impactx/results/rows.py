"""The results table: one row for each final model, and its summary over repeats."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from impactx.approaches.baseline import BASELINE
from impactx.experiment.artifacts import read_result
from impactx.experiment.steps.base import Result
from impactx.experiment.steps.maps import MapsResult
from impactx.experiment.steps.quality import MapQuality
from impactx.experiment.steps.test import Test, TestResult
from impactx.experiment.steps.training import TrainingResult
from impactx.results.records import CellRecord, StepRecord
from impactx.storage import Storage

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Row:
    """One final model that has read the test set. Accuracies are fractions in [0, 1].

    Attributes:
        weight: Lambda; None where the approach has none.
        train_seconds: Of the training's epochs.
        paper_accuracy: The paper's, where it may stand beside ours.
        checkpoint: The address of the model's folder.
        test: Folder of the test under the output's root, where its predictions lie.
        map_quality: Folder of the judgement of the model's maps; None where none was asked for.
        map_seconds: What a prediction costs beyond the network, where it needs a map of its image:
            seconds an image of one process.
        seconds_in_all: Of the processes that made the model, its A and its maps included; None
            where that is not known.
        model_folder, weights: Folder of the training under the output's root, and the fingerprint
            of the weights that it left.
        other_code: Which steps behind the row other code than the job's did, such as "maps, model";
            "" where none (setting reuse).
        train_precision, test_precision, maps_precision: In which its training, its test and the
            maps that it learned from were computed, see `version.Environment`; "" where there are
            none, or where it is not known.
    """

    dataset: str
    model: str
    approach: str
    repeat: int
    weight: float | None
    learning_rate: float
    batch_size: int
    validation_fraction: float
    val_accuracy: float
    test_accuracy: float
    test_images: int
    epochs: int
    train_seconds: float
    paper_accuracy: float | None
    checkpoint: str
    test: str
    map_quality: str | None
    map_seconds: float | None
    seconds_in_all: float | None
    model_folder: str
    weights: str
    other_code: str = ""
    train_precision: str = ""
    test_precision: str = ""
    maps_precision: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return asdict(self)


def cell_rows(storage: Storage, record: CellRecord) -> list[Row]:
    """Return a row for each finished test of a cell, in the order of the flow.

    Args:
        storage: The job's output.
        record: The cell's journal.

    Raises:
        StorageError: A result is damaged or cannot be read.
    """
    steps = {step.folder: step for step in record.steps}
    quality = {step.inputs["model"]: step.folder for step in record.steps
               if step.kind == MapQuality.kind}
    rows = []
    for step in record.steps:
        if step.kind != Test.kind:
            continue
        tested = _result(storage, step.folder, TestResult)
        model = steps.get(step.inputs["model"])
        trained = None if model is None else _result(storage, model.folder, TrainingResult)
        if tested is None or model is None or trained is None or trained.weights is None:
            continue
        p = step.parameters
        rows.append(Row(
            dataset=record.facts.dataset, model=record.facts.model, approach=p["approach"],
            repeat=p["repeat"], weight=p.get("lambda"), learning_rate=p["learning_rate"],
            batch_size=p["batch_size"], validation_fraction=p["validation_fraction"],
            val_accuracy=trained.score("val_accuracy"), test_accuracy=tested.accuracy,
            test_images=tested.images, epochs=trained.epochs, train_seconds=trained.seconds,
            paper_accuracy=p.get("paper_accuracy"), checkpoint=storage.uri(model.folder),
            test=step.folder, map_quality=quality.get(model.folder),
            map_seconds=tested.map_seconds,
            seconds_in_all=_seconds_in_all(storage, model, trained, steps),
            model_folder=model.folder, weights=trained.weights,
            other_code=_other_code(steps, step, model, quality.get(model.folder)),
            train_precision=_precision(trained), test_precision=_precision(tested),
            maps_precision=_precision(_result(storage, model.inputs.get("maps"), MapsResult))))
    return rows


def _precision(result: Result | None) -> str:
    """Return the precision in which a step was computed; several where its parts differ."""
    environments = () if result is None else result.environments
    return " and ".join(sorted({environment.precision for environment in environments}))


def mixed_precisions(rows: Sequence[Row]) -> list[str]:
    """Return a line for each thing that not all rows have done in one precision.

    Numbers of different precisions are not quite comparable; which rows are the odd ones is named.
    """
    lines = []
    for what, precisions in (("trained", [row.train_precision for row in rows]),
                             ("tested", [row.test_precision for row in rows]),
                             ("with maps made", [row.maps_precision for row in rows])):
        counts = Counter(filter(None, precisions)).most_common()
        if len(counts) < 2:
            continue
        usual, number = counts[0]
        others = [f"{row.dataset} x {row.model}, {row.approach} repeat {row.repeat} in {precision}"
                  for row, precision in zip(rows, precisions, strict=True)
                  if precision not in ("", usual)]
        lines.append(f"{what} in {usual}: {number} models; {'; '.join(others)}")
    return lines


def _other_code(steps: Mapping[str, StepRecord], test: StepRecord, model: StepRecord,
                quality: str | None) -> str:
    """Return which steps behind a row other code did; see `Row.other_code`."""
    behind = {"test": test, "model": model, "map quality": steps.get(quality or "")}
    behind |= {what: steps.get(folder) for what, folder in model.inputs.items()}
    return ", ".join(sorted(what for what, step in behind.items()
                            if step is not None and step.reused_code))


def _result(storage: Storage, folder: str | None, kind: type[R]) -> R | None:
    if folder is None:
        return None
    try:
        return read_result(storage, folder, kind)
    except FileNotFoundError:
        return None


def _seconds_in_all(storage: Storage, model: StepRecord, trained: TrainingResult,
                    there: Container[str]) -> float | None:
    """Return the seconds of the processes that made a model, its A and its maps included.

    Args:
        storage: The job's output.
        model: The training.
        trained: Its result.
        there: Folders of the steps whose results can be read.
    """
    seconds: list[float | None] = [trained.seconds]
    classifier, maps = model.inputs.get("classifier"), model.inputs.get("maps")
    if classifier is not None:
        a = _result(storage, classifier, TrainingResult) if classifier in there else None
        seconds.append(a.seconds if a is not None else None)
    # A model that is trained with lambda = 0 learns nothing from its maps.
    if maps is not None and model.parameters.get("lambda") != 0:
        store = _result(storage, maps, MapsResult) if maps in there else None
        seconds.append(store.process_seconds if store is not None else None)
    numbers = [value for value in seconds if value is not None]
    return math.fsum(numbers) if len(numbers) == len(seconds) else None


@dataclass(frozen=True)
class Summary:
    """An approach in a cell, over its repeats.

    Attributes:
        weight: Lambda; None where the approach has none.
        repeats: The number of repeats.
        val_mean, test_mean: Mean accuracies, fractions in [0, 1].
        test_spread, gain_spread: Sample standard deviations; None for one repeat.
        gain_mean: Of the test accuracy over the baseline's of the same repeat; None for the
            baseline, and where no repeat has both.
        seconds: Of all trainings.
        paper_accuracy: The paper's, where it may stand beside ours.
    """

    dataset: str
    model: str
    approach: str
    weight: float | None
    repeats: int
    val_mean: float
    test_mean: float
    test_spread: float | None
    gain_mean: float | None
    gain_spread: float | None
    seconds: float
    paper_accuracy: float | None


def results_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return stream.getvalue()


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Return one summary for each cell and approach, in the rows' order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dataset, row.model, row.approach), []).append(row)
    summaries = []
    for (dataset, model, approach), group in groups.items():
        base = {row.repeat: row.test_accuracy
                for row in groups.get((dataset, model, BASELINE), [])}
        gains = [] if approach == BASELINE else [
            row.test_accuracy - base[row.repeat] for row in group if row.repeat in base]
        tests = [row.test_accuracy for row in group]
        summaries.append(Summary(
            dataset, model, approach, group[0].weight, len(group),
            val_mean=statistics.fmean(row.val_accuracy for row in group),
            test_mean=statistics.fmean(tests), test_spread=_spread(tests),
            gain_mean=statistics.fmean(gains) if gains else None, gain_spread=_spread(gains),
            seconds=math.fsum(row.train_seconds for row in group),
            paper_accuracy=group[0].paper_accuracy))
    return summaries


def table(rows: Sequence[Row]) -> str:
    """Return the summaries as aligned text.

    Accuracies are in percent, times in seconds for one repeat.
    """
    head = ("data set", "model", "approach", "lambda", "repeats", "val %", "test %", "gain over A",
            "paper %", "train s")
    lines = [head, *(_line(summary) for summary in summarise(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines]
    others = [f"  {row.dataset} x {row.model}, {row.approach} repeat {row.repeat}: {row.other_code}"
              for row in rows if row.other_code]
    if others:
        text += ["reused, though done by other code than this job's:", *others]
    if mixed := mixed_precisions(rows):
        text += ["not all in one precision:", *(f"  {line}" for line in mixed)]
    return "\n".join(text)


def _line(s: Summary) -> tuple[str, ...]:
    test = f"{100 * s.test_mean:.2f}"
    if s.test_spread is not None:
        test += f" ± {100 * s.test_spread:.2f}"
    gain = "" if s.gain_mean is None else f"{100 * s.gain_mean:+.2f}"
    if s.gain_spread is not None:
        gain += f" ± {100 * s.gain_spread:.2f}"
    return (s.dataset, s.model, "A (baseline)" if s.approach == BASELINE else s.approach,
            "" if s.weight is None else f"{s.weight:g}", str(s.repeats), f"{100 * s.val_mean:.2f}",
            test, gain, "" if s.paper_accuracy is None else f"{100 * s.paper_accuracy:.2f}",
            f"{s.seconds / s.repeats:.1f}")
