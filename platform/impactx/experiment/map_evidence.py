"""What the maps of an approach's models are worth, over repeats and test images together, and a plain sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from impactx.evaluation.statistics import TwoLevelBootstrap
from impactx.experiment.explanations import RANDOM

Arrays = Mapping[int, Mapping[str, np.ndarray]]
DECODER = "decoder"
MEAN_MAP = "mean_map"  # one map for every image: what a map must beat that says something of an image
_FURTHER = {"all_regions": "probability.all", "logit": "logit.early", "logit_all_regions": "logit.all"}


def maps_over_repeats(found: Arrays, how: Mapping[str, Any]) -> dict[str, Any]:
    """The entry "maps" of `evidence`: orders, explainer, fidelity.

    found: by repeat, the arrays of its map_scores.npz; the images are the same in all. how: arguments of the bootstrap.
    """
    names = sorted(set.intersection(*({key.split(".", 1)[1] for key in arrays if key.startswith("curve.")}
                                      for arrays in found.values())))
    explainers = [name for name in names if name.endswith("_predicted")]
    explainer = next((name for name in explainers if name.startswith("shap")), next(iter(explainers), None))

    def areas_of(part: str) -> TwoLevelBootstrap:
        return TwoLevelBootstrap({name: {repeat: arrays[f"aopc.{name}.{part}"] for repeat, arrays in found.items()}
                                  for name in names}, **how)

    areas, further = areas_of("probability.early"), {key: areas_of(part) for key, part in _FURTHER.items()}

    def over(name: str, other: str | None) -> dict[str, Any] | None:
        gain = areas.gain(name, other) if other in names and other != name else None
        return gain.as_dict() if gain else None

    orders = {name: {"aopc": areas.mean(name).as_dict(), "over_random": over(name, RANDOM),
                     "over_explainer": over(name, explainer), "over_mean_map": over(name, MEAN_MAP)}
              | {key: each.mean(name).as_dict() for key, each in further.items()} for name in names}
    return {"orders": orders, "explainer": explainer, "fidelity": _fidelity(found, how)}


def _fidelity(found: Arrays, how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    predictors: dict[str, dict[str, Any]] = {}
    for measure in ("mse", "correlation", "overlap"):
        keys = [key for key in next(iter(found.values()))
                if key.startswith("fidelity.") and key.endswith(f".{measure}")]
        if not keys:
            continue
        # A constant map has no correlation: such an image is left out for every predictor and repeat.
        usable = np.isfinite([arrays[key] for arrays in found.values() for key in keys]).all(0)
        if usable.any():
            each = TwoLevelBootstrap({key: {repeat: arrays[key][usable] for repeat, arrays in found.items()}
                                      for key in keys}, **how)
            for key in keys:
                name, own = key.split(".")[1], f"fidelity.{DECODER}.{measure}"
                gain = each.gain(own, key) if own in keys and key != own else None
                predictors.setdefault(name, {})[measure] = each.mean(key).as_dict() | {
                    "decoder_over": gain.as_dict() if gain else None}
    return predictors


def map_sentence(approach: str, maps: Mapping[str, Any]) -> str:
    """What the decoder's maps say about the model's own predictions. maps: with an order "decoder"."""
    own, parts = maps["orders"][DECODER], []
    explainer = f"{(maps['explainer'] or '').removesuffix('_predicted')} of the model itself"
    for key, other in (("over_random", "a random order"), ("over_mean_map", "one mean map for every image"),
                       ("over_explainer", explainer)):
        if (gain := own[key]) is not None:
            parts.append(f"{abs(gain['mean']):.3f} {'more' if gain['mean'] >= 0 else 'less'} than {other} "
                         f"[{gain['low']:+.3f}, {gain['high']:+.3f}]")
    text = (f"Noise on the 16 % of an image that the decoder of {approach} marks first lowers the predicted class's "
            f"probability by {own['aopc']['mean']:.3f} on average over the steps")
    text += f": {', '.join(parts)}" if parts else ""
    decoded, mean = (maps["fidelity"].get(name, {}).get("correlation") for name in (DECODER,
                                                                                   "class_mean_of_predicted"))
    if decoded and mean and (gain := mean["decoder_over"]):
        text += (f"; its maps correlate {decoded['mean']:.2f} with those that it learns, the predicted class's mean "
                 f"map {mean['mean']:.2f} (difference {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}])")
    return text + "."
