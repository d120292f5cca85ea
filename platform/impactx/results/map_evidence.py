"""What the maps of an approach's models are worth, over repeats and test images together, and a
plain sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from impactx.evaluation.metrics.fidelity import DECODER
from impactx.evaluation.metrics.morf import RANDOM
from impactx.evaluation.statistics import TwoLevelBootstrap

Arrays = Mapping[int, Mapping[str, np.ndarray]]
MEAN_MAP = "mean_map"  # one map for every image: what a map must beat that says something of an image
_FURTHER = {"all_regions": "probability.all", "logit": "logit.early", "logit_all_regions": "logit.all"}


def maps_over_repeats(found: Arrays, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry "maps" of `evidence`: orders, explainer, fidelity, metrics.

    Args:
        found: By repeat, the arrays of its map_scores.npz; the images are the same in all.
        how: Arguments of the bootstrap.
    """
    fidelity = _values(found, "fidelity", how)
    metrics = {metric: _values(found, metric, how) for metric in _metrics(found) if metric != "fidelity"}
    orders, explainer = _orders(found, how)
    return {"orders": orders, "explainer": explainer, "fidelity": fidelity, "metrics": metrics}


def _orders(found: Arrays, how: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return MoRF's areas by order, and the order of the explainer; nothing where MoRF was not
    measured.
    """
    names = sorted(set.intersection(*({key.split(".", 1)[1] for key in arrays if key.startswith("curve.")}
                                      for arrays in found.values())))
    if not names:
        return {}, None
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
    return orders, explainer


def _metrics(found: Arrays) -> list[str]:
    """Return the metrics whose values are kept as arrays <metric>.<order>.<value>."""
    parts = [key.split(".") for key in next(iter(found.values()))]
    return list(dict.fromkeys(part[0] for part in parts if len(part) == 3))


def _values(found: Arrays, metric: str, how: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a metric's values by order and name, each with the decoder's paired difference,
    "decoder_over".
    """
    orders: dict[str, dict[str, Any]] = {}
    shared = [key for key in next(iter(found.values())) if all(key in arrays for arrays in found.values())]
    parts = {key: key.split(".") for key in shared}
    parts = {key: part for key, part in parts.items() if len(part) == 3 and part[0] == metric}
    for name in dict.fromkeys(part[2] for part in parts.values()):
        keys = [key for key, part in parts.items() if part[2] == name]
        # A constant map has no correlation: such an image is left out for every order and repeat.
        usable = np.isfinite([arrays[key] for arrays in found.values() for key in keys]).all(0)
        if usable.any():
            each = TwoLevelBootstrap({key: {repeat: arrays[key][usable] for repeat, arrays in found.items()}
                                      for key in keys}, **how)
            for key in keys:
                order, own = parts[key][1], f"{metric}.{DECODER}.{name}"
                gain = each.gain(own, key) if own in keys and key != own else None
                orders.setdefault(order, {})[name] = each.mean(key).as_dict() | {
                    "decoder_over": gain.as_dict() if gain else None}
    return orders


def map_sentence(approach: str, maps: Mapping[str, Any]) -> str:
    """What the decoder's maps say about the model's own predictions. maps: with an order "decoder".
    """
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
