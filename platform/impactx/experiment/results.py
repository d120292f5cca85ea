"""The results table: one row for each final model, and its summary over repeats."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Row:
    """One final model. Accuracies are fractions in [0, 1]; weight is lambda, None where there is none.

    test: folder of the test unit under the output's root, where its predictions.npz lies; map_quality: of the unit
    that judged the model's maps, None where none was asked for. Both None in results of earlier versions.
    map_seconds: what a prediction costs beyond the network, where it needs a map: seconds an image of one process.
    seconds_in_all: of the processes that made the model, A and its maps included; None where it is not known.
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
    test: str | None = None
    map_quality: str | None = None
    map_seconds: float | None = None
    seconds_in_all: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Summary:
    """An approach in a cell, over its repeats. Spreads are sample standard deviations, None for one repeat."""

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
    """The rows as CSV with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return stream.getvalue()


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary for each cell and approach, in the rows' order.

    Gains are test accuracies minus the baseline's of the same cell and repeat (paired), None for the baseline.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dataset, row.model, row.approach), []).append(row)
    found = []
    for (dataset, model, approach), group in groups.items():
        base = {r.repeat: r.test_accuracy for r in groups.get((dataset, model, "baseline"), [])}
        gains = [r.test_accuracy - base[r.repeat] for r in group if r.repeat in base] if approach != "baseline" else []
        tests = [r.test_accuracy for r in group]
        found.append(Summary(dataset, model, approach, group[0].weight, len(group),
                             statistics.fmean(r.val_accuracy for r in group), statistics.fmean(tests), _spread(tests),
                             statistics.fmean(gains) if gains else None, _spread(gains) if gains else None,
                             math.fsum(r.train_seconds for r in group), group[0].paper_accuracy))
    return found


def table(rows: Sequence[Row]) -> str:
    """The summary as aligned text, accuracies in percent, times in seconds a repeat."""
    head = ("data set", "model", "approach", "lambda", "repeats", "val %", "test %", "gain over A", "paper %",
            "train s")
    lines = [head]
    for s in summarise(rows):
        plus_minus = f" ± {100 * s.test_spread:.2f}" if s.test_spread is not None else ""
        gain = "" if s.gain_mean is None else f"{100 * s.gain_mean:+.2f}" + (
            f" ± {100 * s.gain_spread:.2f}" if s.gain_spread is not None else "")
        lines.append((s.dataset, s.model, "A (baseline)" if s.approach == "baseline" else s.approach,
                      "" if s.weight is None else f"{s.weight:g}", str(s.repeats), f"{100 * s.val_mean:.2f}",
                      f"{100 * s.test_mean:.2f}{plus_minus}", gain,
                      "" if s.paper_accuracy is None else f"{100 * s.paper_accuracy:.2f}",
                      f"{s.seconds / s.repeats:.1f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)
