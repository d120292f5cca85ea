"""From the rows of a job to what they show: who is better, by how much, and how surely."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from impactx.approaches.base import Approach
from impactx.approaches.baseline import BASELINE
from impactx.approaches.role import Role
from impactx.evaluation.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    per_class_accuracy,
)
from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.pooling import CellGain, CommonEffect, common_effect
from impactx.evaluation.statistics import CrossedMeans
from impactx.experiment.artifacts import MAP_SCORES, PREDICTIONS, read_arrays, read_result
from impactx.experiment.steps.quality import QualityResult
from impactx.results.evidence_records import (
    ApproachEvidence,
    CellEvidence,
    Evidence,
    Gain,
    MapEvidence,
    Summary,
)
from impactx.results.map_evidence import maps_over_repeats
from impactx.results.records import Start, pilot_repeats
from impactx.results.rows import Row
from impactx.results.verdicts import Rules, judged
from impactx.settings import EvaluationSettings, ExperimentSettings
from impactx.storage import Storage, StorageError


def roles(settings: ExperimentSettings) -> dict[str, Role]:
    """Return the part of every approach in the comparison, A included, by the approach's name."""
    return {BASELINE: Role("a")} | {
        name: approach.role(settings.attribution)
        for name, approach in settings.approaches.items() if isinstance(approach, Approach)}


def evidence(storage: Storage, rows: Sequence[Row], settings: ExperimentSettings,
             starts: Sequence[Start] = ()) -> Evidence:
    """Return what finished rows show.

    It reads the predictions and the judged maps that the steps left; no model computes anything.

    Args:
        storage: The job's output.
        rows: Of final models that have read the test set.
        settings: The experiment's.
        starts: All starts of the job. Repeats that were a pilot are left out.
    """
    pilot = pilot_repeats(starts)
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.repeat >= pilot:
            groups.setdefault((row.dataset, row.model), {}).setdefault(row.approach, []).append(row)
    part_of = roles(settings)
    chosen = settings.evaluation
    readers = [_Cell(storage, dataset, model, part_of, chosen) for dataset, model in groups]
    cells = judged(
        [reader.evidence(approaches)
         for reader, approaches in zip(readers, groups.values(), strict=True)],
        part_of, Rules(1 - chosen.confidence, chosen.margin / 100),
        _note(settings, starts, pilot))
    return Evidence(
        confidence=chosen.confidence, margin=chosen.margin, repeats=settings.repeats, pilot=pilot,
        cells=cells, common=_common(readers, cells, chosen.confidence))


def _note(settings: ExperimentSettings, starts: Sequence[Start], pilot: int) -> str:
    """Return what a reader must know of how the number of repeats and the margin came about."""
    looks = [start.seen for start in starts if start.seen and start.seen.repeats > pilot]
    fewer = sorted({look.repeats for look in looks if look.repeats < settings.repeats})
    more = [look.repeats for look in looks if look.repeats > settings.repeats]
    margins = dict.fromkeys(look.margin for look in looks
                            if look.margin != settings.evaluation.margin)
    parts = []
    if pilot:
        parts.append(f"The first {pilot} repeats were a pilot, which is not counted.")
    if fewer:
        parts.append(
            f"Repeats were added after a look at the results of {' and of '.join(map(str, fewer))},"
            " for which nothing is corrected, so wrong verdicts come more often than is said.")
    if more:
        parts.append(f"The results of {max(more)} repeats had been seen, and are left out in part.")
    if margins:
        parts.append("When results were first seen, the margin was "
                     f"{' and '.join(f'{margin:g}' for margin in margins)} points.")
    return " ".join(parts)


def _common(readers: Sequence[_Cell], cells: Sequence[CellEvidence], confidence: float
            ) -> list[CommonEffect]:
    """Return the gains over several cells, of every approach that has a verdict."""
    by_comparison: dict[tuple[str, str], dict[str, CellGain]] = {}
    for reader, cell in zip(readers, cells, strict=True):
        for entry in cell.approaches:
            if reader.means is None or entry.approach not in cell.verdicts:
                continue
            for over in entry.gains:
                pair = entry.approach, over
                repeats = reader.means.shared(*pair)
                by_comparison.setdefault(pair, {})[f"{cell.dataset} x {cell.model}"] = CellGain(
                    pair, repeats, reader.means.parts(*pair, repeats), cell.test_images)
    effects = [common_effect(gains, confidence) for gains in by_comparison.values()
               if len(gains) > 1]
    return [effect for effect in effects if effect is not None]


class _Cell:
    """Reads what the models of one cell left, and notes what cannot be read."""

    def __init__(self, storage: Storage, dataset: str, model: str, part_of: Mapping[str, Role],
                 settings: EvaluationSettings) -> None:
        self.storage, self.dataset, self.model = storage, dataset, model
        self.roles, self.settings = part_of, settings
        self.missing: list[str] = []
        self.means: CrossedMeans | None = None

    def evidence(self, approaches: Mapping[str, Sequence[Row]]) -> CellEvidence:
        """Return the cell without verdicts.

        Args:
            approaches: Rows by approach.
        """
        labels, predictions = self._predictions(approaches)
        if labels is None:
            return CellEvidence(dataset=self.dataset, model=self.model, missing=self.missing)
        self.means = means = CrossedMeans(
            {name: {repeat: scores.argmax(1) == labels for repeat, (_, scores) in models.items()}
             for name, models in predictions.items()}, confidence=self.settings.confidence)
        entries = [self._approach(name, models, labels, means, list(predictions))
                   for name, models in predictions.items()]
        return CellEvidence(dataset=self.dataset, model=self.model, test_images=len(labels),
                            approaches=entries, missing=self.missing)

    def _predictions(self, approaches: Mapping[str, Sequence[Row]]
                     ) -> tuple[np.ndarray | None, dict[str, dict[int, tuple[Row, np.ndarray]]]]:
        """Return the labels (N,), and by approach and repeat the row and its scores (N, K)."""
        labels: np.ndarray | None = None
        predictions: dict[str, dict[int, tuple[Row, np.ndarray]]] = {}
        for name, rows in approaches.items():
            for row in rows:
                arrays = self._arrays(f"{row.test}/{PREDICTIONS}", row)
                if arrays is None:
                    continue
                if labels is not None and not np.array_equal(labels, arrays["labels"]):
                    self._note(row, "its predictions are of other test images than those of "
                               "the cell's other models")
                    continue
                labels = arrays["labels"]
                predictions.setdefault(name, {})[row.repeat] = row, arrays["probabilities"]
        return labels, predictions

    def _arrays(self, path: str, row: Row) -> dict[str, np.ndarray] | None:
        """Return the arrays of a step's file, or None where they cannot be read."""
        try:
            return read_arrays(self.storage, path)
        except FileNotFoundError:
            self._note(row, f"{self.storage.uri(path)} is missing")
        except StorageError as error:
            self._note(row, str(error))
        return None

    def _note(self, row: Row, reason: str) -> None:
        self.missing.append(f"{row.approach} repeat {row.repeat}: {reason}")

    def _approach(self, name: str, models: Mapping[int, tuple[Row, np.ndarray]],
                  labels: np.ndarray, means: CrossedMeans, names: Sequence[str]
                  ) -> ApproachEvidence:
        in_order = [models[repeat] for repeat in sorted(models)]
        rows, scores = [row for row, _ in in_order], [one for _, one in in_order]
        own = self.roles[name]
        by_class = zip(*(per_class_accuracy(one, labels) for one in scores), strict=True)
        return ApproachEvidence(
            approach=name, role=own.kind, candidates=own.candidates, weight=rows[0].weight,
            repeats=[row.repeat for row in rows],
            seconds=statistics.fmean(row.train_seconds for row in rows),
            paper=rows[0].paper_accuracy,
            seconds_in_all=_mean_of_all([row.seconds_in_all for row in rows]),
            map_seconds=_mean_of_all([row.map_seconds for row in rows]),
            checkpoints=[row.checkpoint for row in rows], accuracy=means.mean(name),
            val_accuracy=_summary([row.val_accuracy for row in rows]),
            ece=_summary([expected_calibration_error(one, labels) for one in scores]),
            nll=_summary([negative_log_likelihood(one, labels) for one in scores]),
            per_class=[_mean_of_all(values) for values in by_class],
            gains=self._gains(name, means, names),
            map_quality=[self._map_quality(row) for row in rows], maps=self._maps(rows))

    def _gains(self, name: str, means: CrossedMeans, names: Sequence[str]) -> dict[str, Gain]:
        """Return an approach's gains over its references in the cell."""
        gains: dict[str, Gain] = {}
        for over, role in self.roles.items():
            if name in (BASELINE, over) or over not in names or not self.roles[name].over(role):
                continue
            gain = means.gain(name, over)
            if gain is not None:
                gains[over] = Gain(**gain.as_dict())
        return gains

    def _map_quality(self, row: Row) -> MapQuality | None:
        if row.map_quality is None:
            return None
        try:
            return read_result(self.storage, row.map_quality, QualityResult).quality
        except FileNotFoundError:
            self._note(row, f"{self.storage.uri(row.map_quality)} is missing")
        except StorageError as error:
            self._note(row, str(error))
        return None

    def _maps(self, rows: Sequence[Row]) -> MapEvidence | None:
        arrays = {row.repeat: self._arrays(f"{row.map_quality}/{MAP_SCORES}", row)
                  for row in rows if row.map_quality is not None}
        readable = {repeat: one for repeat, one in arrays.items() if one is not None}
        return (maps_over_repeats(readable, confidence=self.settings.confidence) if readable
                else None)


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where a value is."""
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if len(numbers) == len(values) else None


def _summary(values: Sequence[float]) -> Summary:
    return Summary(mean=statistics.fmean(values),
                   spread=statistics.stdev(values) if len(values) > 1 else None)


def sentences(results: Evidence) -> str:
    """Return the lines on each cell and on all of them, for the end of a job's output."""
    lines = [f"{cell.dataset} x {cell.model}: {text}" for cell in results.cells
             for text in (cell.sentence, cell.map_sentence) if text]
    return "\n".join([*lines, *(common_sentence(effect) for effect in results.common)])


def common_sentence(effect: CommonEffect) -> str:
    """Return what a gain is over several cells, and which cells that covers."""
    text = (f"{effect.approach} over {effect.over} in {len(effect.cells)} cells: "
            f"{100 * effect.mean:+.2f} points [{100 * effect.low:+.2f}, {100 * effect.high:+.2f}], "
            f"p = {effect.p:.2g}")
    if effect.between is None:
        return (f"{text}: the mean of these cells; so few cannot tell how much cells differ, and "
                "it says nothing about others.")
    return (f"{text}: for cells like these (random effects, Hartung-Knapp), whose true gains "
            f"differ by a standard deviation of {100 * effect.between:.2f} points.")
