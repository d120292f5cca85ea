"""From the rows of a job to what they show: who is better, by how much, how sure, and a plain
sentence a cell.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from impactx.approaches.base import Approach
from impactx.approaches.baseline import BASELINE
from impactx.approaches.role import CONTROLS, REFERENCES, Role
from impactx.evaluation.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    per_class_accuracy,
)
from impactx.evaluation.statistics import TwoLevelBootstrap, holm
from impactx.experiment.artifacts import MAP_SCORES, PREDICTIONS, read_arrays, read_result
from impactx.experiment.steps.quality import QualityResult
from impactx.results.map_evidence import map_sentence, maps_over_repeats
from impactx.results.rows import Row
from impactx.settings import ExperimentSettings
from impactx.storage import Storage, StorageError

# Fewer do not carry a sentence that claims a difference (docs/METHOD.md).
REPEATS_FOR_A_CLAIM = 5


def roles(settings: ExperimentSettings) -> dict[str, Role]:
    """What every approach is in the comparison, A included, by its name."""
    return {BASELINE: Role("a")} | {name: approach.role(settings.attribution)
                                    for name, approach in settings.approaches.items() if isinstance(approach, Approach)}


def evidence(storage: Storage, rows: Sequence[Row], settings: ExperimentSettings) -> dict[str, Any]:
    """What finished rows show, as plain JSON data. Reads predictions.npz of their test units,
    computes nothing else.

    storage: the job's output; settings: the experiment's. Accuracies and gains are fractions in [0,
    1].
    An *interval* is a dict with mean, spread (sample standard deviation over repeats, None for
    one), low, high, p (of a gain, two-sided; else None), repeats, images, and over ("repeats and
    images", or "images" where there is one repeat); see evaluation.statistics. A *summary* is a
    dict with mean and spread. Keys:

        confidence, resamples, seed     of the intervals
        cells       a list, one for each data set and model, in the rows' order, each with
          dataset, model, test_images
          approaches  a list in the rows' order, each with
            approach, role and candidates (approaches.role), weight (lambda or None), repeats (their
            numbers), seconds (of training, a repeat), seconds_in_all (the same with the A and the
            maps that it needs, of all processes, or None), map_seconds (what a prediction needs for
            a map of its image, or None), paper (fraction or None), checkpoints (by repeat, a list
            beside repeats) accuracy          interval, on the test set val_accuracy      summary
            ece, nll          summaries: expected calibration error (15 bins), negative log
            likelihood in nats per_class         accuracy of each class, mean over repeats, in the
            order of the labels (None: no image) gains             by reference that the cell has
            (A, what is trained with lambda = 0, with shuffled maps;
                              of a single stage, the same in two; never itself): interval of the
                              paired difference, and p_holm: p corrected over the cells that make
                              the same comparison
            map_quality       by repeat, a list beside repeats: result of the unit that judged the
            maps, a
                              `MapQuality` as plain data, None where there is none; see maps for all
                              repeats together
            maps              None where no repeat's maps were judged; else, over repeats and test
            images together,
              orders          of MoRF, by order {"aopc", "over_random", "over_explainer",
              "over_mean_map"}: AOPC of the
                              predicted class's probability over the first 16 % of the regions, an
                              interval, and its paired differences (None for the order itself, or
                              where there is no such order; their p is not corrected);
                              "all_regions", "logit", "logit_all_regions": the same area over all
                              regions, and both of the class's score
              explainer       the order that over_explainer means: of SHAP for the predicted class,
              or None fidelity        by predictor {"mse", "correlation", "overlap"}: intervals,
              each with decoder_over, the
                              decoder's paired difference (None for itself); {} without a decoder
              metrics         of all other metrics of maps, by metric, order and value: as fidelity
          verdicts    by approach that learns its own explanations (lambda above 0): {"verdict",
          "sentence"}, where
                      verdict is "help", "do not help", "hurt" or "cannot tell"
          sentence    the cell's: of "impactx", or of the first approach that has a verdict, or why
          there is none map_sentence  what the maps of the same approach are worth, or None where
          they were not judged missing     sentences about what could not be read

    An approach none of whose predictions can be read is left out of the cell and named in missing.
    """
    cells: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        cells.setdefault((row.dataset, row.model), {}).setdefault(row.approach, []).append(row)
    e = settings.evaluation
    resamples, seed, confidence = e.resamples, e.seed, e.confidence
    known, how = roles(settings), dict(resamples=resamples, seed=seed, confidence=confidence)
    found = [_cell(storage, dataset, model, approaches, known, how) for (dataset, model), approaches in cells.items()]
    _correct(found)
    for cell in found:
        _judge(cell, known, 1 - confidence)
    return {"confidence": confidence, "resamples": resamples, "seed": seed, "cells": found}


def _read(storage: Storage, row: Row, missing: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
    name = f"{row.approach} repeat {row.repeat}"
    if row.test is None:
        missing.append(f"{name}: its result is of an earlier version, start the same command again")
        return None
    held = _arrays(storage, f"{row.test}/{PREDICTIONS}", row, missing)
    return None if held is None else (held["labels"], held["probabilities"])


def _arrays(storage: Storage, path: str, row: Row, missing: list[str]) -> dict[str, np.ndarray] | None:
    """The arrays of a unit's file; None, and a line in missing, where they cannot be read."""
    name = f"{row.approach} repeat {row.repeat}"
    try:
        return read_arrays(storage, path)
    except FileNotFoundError:
        missing.append(f"{name}: {storage.uri(path)} is missing")
    except StorageError as error:
        missing.append(f"{name}: {error}")
    return None


def _cell(storage: Storage, dataset: str, model: str, approaches: dict[str, list[Row]], known: Mapping[str, Role],
          how: dict[str, Any]) -> dict[str, Any]:
    missing: list[str] = []
    usable: dict[str, dict[int, tuple[Row, np.ndarray]]] = {}
    labels: np.ndarray | None = None
    for name, group in approaches.items():
        for row in group:
            if (read := _read(storage, row, missing)) is None:
                continue
            if labels is not None and not np.array_equal(labels, read[0]):
                missing.append(f"{name} repeat {row.repeat}: its predictions are of other test images than the cell's")
                continue
            labels = read[0]
            usable.setdefault(name, {})[row.repeat] = row, read[1]
    cell: dict[str, Any] = {"dataset": dataset, "model": model, "test_images": 0, "approaches": [],
                            "missing": missing}
    if labels is None:
        return cell
    bootstrap = TwoLevelBootstrap({name: {repeat: p.argmax(1) == labels for repeat, (_, p) in found.items()}
                                   for name, found in usable.items()}, **how)
    cell["test_images"] = len(labels)
    for name, found in usable.items():
        in_order = [found[repeat] for repeat in sorted(found)]
        held, probabilities = [r for r, _ in in_order], [p for _, p in in_order]
        gains = {over: gain.as_dict() for over, role in known.items() if known[name].over(role) and over in usable
                 and over != name and name != BASELINE and (gain := bootstrap.gain(name, over)) is not None}
        cell["approaches"].append({
            "approach": name, "role": known[name].kind, "candidates": known[name].candidates,
            "weight": held[0].weight, "repeats": [r.repeat for r in held],
            "seconds": statistics.fmean(r.train_seconds for r in held), "paper": held[0].paper_accuracy,
            "seconds_in_all": _mean_of([r.seconds_in_all for r in held]),
            "map_seconds": _mean_of([r.map_seconds for r in held]),
            "checkpoints": [r.checkpoint for r in held], "accuracy": bootstrap.mean(name).as_dict(),
            "val_accuracy": _summary([r.val_accuracy for r in held]),
            "ece": _summary([expected_calibration_error(p, labels) for p in probabilities]),
            "nll": _summary([negative_log_likelihood(p, labels) for p in probabilities]),
            "per_class": [None if values[0] is None else statistics.fmean(values) for values in zip(
                *(per_class_accuracy(p, labels) for p in probabilities), strict=True)],
            "gains": gains, "map_quality": [_map_quality(storage, r, missing) for r in held],
            "maps": _maps(storage, held, missing, how)})
    return cell


def _maps(storage: Storage, rows: Sequence[Row], missing: list[str], how: dict[str, Any]) -> dict[str, Any] | None:
    read = {row.repeat: _arrays(storage, f"{row.map_quality}/{MAP_SCORES}", row, missing)
            for row in rows if row.map_quality is not None}
    found = {repeat: arrays for repeat, arrays in read.items() if arrays is not None}
    return maps_over_repeats(found, how) if found else None


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def _map_quality(storage: Storage, row: Row, missing: list[str]) -> dict[str, Any] | None:
    if row.map_quality is None:
        return None
    try:
        return read_result(storage, row.map_quality, QualityResult).quality.to_json()
    except FileNotFoundError:
        missing.append(f"{row.approach} repeat {row.repeat}: {storage.uri(row.map_quality)} is missing")
    except StorageError as error:
        missing.append(f"{row.approach} repeat {row.repeat}: {error}")
    return None


def _correct(cells: list[dict[str, Any]]) -> None:
    """Set p_holm: over the cells that make the same comparison (approach against reference)."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        for entry in cell["approaches"]:
            for over, gain in entry["gains"].items():
                families.setdefault((entry["approach"], over), []).append(gain)
    for family in families.values():
        for gain, p in zip(family, holm([g["p"] for g in family]), strict=True):
            gain["p_holm"] = p


def _judge(cell: dict[str, Any], known: Mapping[str, Role], alpha: float) -> None:
    cell["verdicts"] = {}
    for entry in cell["approaches"]:
        if entry["weight"] and entry["role"] == "explained":
            verdict, sentence = _verdict(entry, known, alpha)
            cell["verdicts"][entry["approach"]] = {"verdict": verdict, "sentence": sentence}
    chosen = cell["verdicts"].get("impactx") or next(iter(cell["verdicts"].values()), None)
    cell["sentence"] = chosen["sentence"] if chosen else "No finished model has learned from explanations."
    judged = [e for e in cell["approaches"] if e["approach"] in cell["verdicts"] and e["maps"]
              and "decoder" in e["maps"]["orders"]]
    first = next((e for e in judged if e["approach"] == "impactx"), next(iter(judged), None))
    cell["map_sentence"] = map_sentence(first["approach"], first["maps"]) if first else None


def _verdict(entry: dict[str, Any], known: Mapping[str, Role], alpha: float) -> tuple[str, str]:
    name, gains = entry["approach"], entry["gains"]
    controls = {over: g for over, g in gains.items() if known[over].kind in CONTROLS}
    asked = ("approaches.single_stage0={kind: single_stage, lambdas: [0]}" if known[name].at_once
             else "approach=[impactx,lambda0,shuffled]")
    numbers = _numbers(entry, known)
    repeats = min((g["repeats"] for g in gains.values()), default=0)
    absent = " and ".join(text for kind, text in REFERENCES.items() if kind not in {known[over].kind for over in gains})

    def sure(gain: dict[str, Any], sign: int, tries: int = 1) -> bool:
        return tries * gain["p_holm"] < alpha and sign * gain["mean"] > 0

    if not gains:
        return "cannot tell", f"What {name} gains cannot be told: the cell has neither A nor a control with results."
    if not controls:
        return "cannot tell", (f"Whether the explanations help cannot be told, no control was run ({asked}); "
                               f"{name}: {numbers}.")
    if repeats < REPEATS_FOR_A_CLAIM:
        return "cannot tell", (f"Whether the explanations help cannot be told from {repeats} "
                               f"repeat{'s' if repeats > 1 else ''}: {REPEATS_FOR_A_CLAIM} are asked for "
                               f"(repeats={REPEATS_FOR_A_CLAIM}); {name}: {numbers}.")
    above_a = BASELINE in gains and sure(gains[BASELINE], 1)
    if any(sure(g, -1, len(controls)) for g in controls.values()):
        return "hurt", f"The explanations hurt: {name} gains {numbers}."
    if not all(sure(g, 1) for g in controls.values()):
        what = "is better than A, but not surely better than its controls" if above_a else "is not surely better"
        return "do not help", f"The explanations do not help as far as can be told: {name} {what}: {numbers}."
    if BASELINE in gains and not above_a:
        return "do not help", (f"The explanations help {name} against its controls, but not beyond A: {numbers}.")
    if absent:
        return "cannot tell", (f"Whether the explanations help cannot be told: {name} was not compared with {absent} "
                               f"({asked}); {name} gains {numbers}.")
    return "help", f"The explanations help: {name} gains {numbers}."


def _numbers(entry: dict[str, Any], known: Mapping[str, Role]) -> str:
    """The gains, and what must be known to read them."""
    ours = known[entry["approach"]]
    said = [f"{_points(gain)} over {ours.over(known[over])}" for over, gain in entry["gains"].items()]
    if any(gain["over"] == "images" for gain in entry["gains"].values()):
        said.append("one repeat: the intervals leave out how much trainings differ")
    said += [f"{entry['approach']} was chosen from {ours.candidates} candidates, {over} from {theirs}: the gain over "
             "it has the longer search in it"
             for over in entry["gains"] if (theirs := known[over].candidates) and theirs < (ours.candidates or 0)]
    return "; ".join(said)


def _points(gain: dict[str, Any]) -> str:
    return (f"{100 * gain['mean']:+.2f} points [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}], "
            f"p = {gain['p_holm']:.2g}" + (" (Holm)" if gain["p_holm"] != gain["p"] else ""))


def sentences(found: dict[str, Any]) -> str:
    """One line or two a cell, for the end of a job's output."""
    return "\n".join(f"{c['dataset']} x {c['model']}: {text}" for c in found["cells"]
                     for text in (c["sentence"], c["map_sentence"]) if text)
