"""What the maps of an approach's models are worth, over repeats and test images together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from impactx.evaluation.metrics.fidelity import DECODER
from impactx.evaluation.metrics.morf import RANDOM
from impactx.evaluation.statistics import CrossedMeans, Estimate
from impactx.results.evidence_records import MapEvidence, MapValue, OrderAreas, Values

Arrays = Mapping[int, Mapping[str, np.ndarray]]
"""By repeat, the arrays of its map_scores.npz: N entries each, of the same images everywhere."""

Means = Callable[[Mapping[str, Mapping[int, np.ndarray]]], CrossedMeans]
# The same map for every image: a map that says something of its own image beats it.
MEAN_MAP = "mean_map"


def maps_over_repeats(arrays: Arrays, *, confidence: float) -> MapEvidence:
    """Return what the maps of an approach are worth.

    Args:
        arrays: Of at least one repeat.
        confidence: Of the intervals, in (0, 1).
    """
    means = partial(CrossedMeans, confidence=confidence)

    fidelity = _values(arrays, "fidelity", means)
    metrics = {metric: _values(arrays, metric, means) for metric in _metrics(arrays)
               if metric != "fidelity"}
    orders, explainer = _orders(arrays, means)
    return MapEvidence(orders=orders, explainer=explainer, fidelity=fidelity, metrics=metrics)


def _orders(arrays: Arrays, crossed: Means) -> tuple[dict[str, OrderAreas], str | None]:
    """Return MoRF's areas by order and the explainer's order; nothing where there is no MoRF."""
    names = sorted(set.intersection(*(
        {key.split(".", 1)[1] for key in one if key.startswith("curve.")}
        for one in arrays.values())))
    if not names:
        return {}, None
    explainers = [name for name in names if name.endswith("_predicted")]
    explainer = next((name for name in explainers if name.startswith("shap")),
                     next(iter(explainers), None))

    def areas_of(part: str) -> CrossedMeans:
        return crossed({name: {repeat: one[f"aopc.{name}.{part}"]
                               for repeat, one in arrays.items()} for name in names})

    early = areas_of("probability.early")
    all_regions = areas_of("probability.all")
    logit, logit_all_regions = areas_of("logit.early"), areas_of("logit.all")

    def over(name: str, other: str | None) -> Estimate | None:
        return early.gain(name, other) if other and other in names and other != name else None

    return {name: OrderAreas(
        aopc=early.mean(name), over_random=over(name, RANDOM),
        over_explainer=over(name, explainer), over_mean_map=over(name, MEAN_MAP),
        all_regions=all_regions.mean(name), logit=logit.mean(name),
        logit_all_regions=logit_all_regions.mean(name)) for name in names}, explainer


def _metrics(arrays: Arrays) -> list[str]:
    """Return the metrics whose values are kept as arrays <metric>.<order>.<value>."""
    parts = [key.split(".") for key in next(iter(arrays.values()))]
    return list(dict.fromkeys(part[0] for part in parts if len(part) == 3))


def _values(arrays: Arrays, metric: str, crossed: Means) -> Values:
    """Return a metric's values by order and name, each beside the decoder's."""
    orders: Values = {}
    shared = [key for key in next(iter(arrays.values()))
              if all(key in one for one in arrays.values())]
    parts = {key: part for key in shared
             if len(part := key.split(".")) == 3 and part[0] == metric}
    for name in dict.fromkeys(part[2] for part in parts.values()):
        keys = [key for key, part in parts.items() if part[2] == name]
        # A constant map has no correlation: such an image is left out for every order and repeat.
        usable = np.isfinite([one[key] for one in arrays.values() for key in keys]).all(0)
        if not usable.any():
            continue
        means = crossed({key: {repeat: one[key][usable] for repeat, one in arrays.items()}
                         for key in keys})
        decoder = f"{metric}.{DECODER}.{name}"
        for key in keys:
            ahead = means.gain(decoder, key) if decoder in keys and key != decoder else None
            orders.setdefault(parts[key][1], {})[name] = MapValue(
                **means.mean(key).as_dict(), decoder_over=ahead)
    return orders


def map_sentence(approach: str, maps: MapEvidence) -> str:
    """Return what the decoder's maps say about the model's own predictions.

    Args:
        approach: The name of the approach.
        maps: With an order "decoder".
    """
    own = maps.orders[DECODER]
    explainer = (maps.explainer or "").removesuffix("_predicted")
    compared = [(own.over_random, "with a random order"),
                (own.over_mean_map, "with one mean map for every image"),
                (own.over_explainer, f"with the maps of the model itself by {explainer}")]
    parts = [f"{abs(gain.mean):.3f} {'more' if gain.mean >= 0 else 'less'} than {other} "
             f"[{gain.low:+.3f}, {gain.high:+.3f}]" for gain, other in compared if gain is not None]
    text = (f"Noise on the 16 % of an image that the decoder of {approach} marks first lowers the "
            f"probability of the predicted class by {own.aopc.mean:.3f} on average over the steps")
    text += f": {', '.join(parts)}" if parts else ""
    decoded, mean = (maps.fidelity.get(name, {}).get("correlation")
                     for name in (DECODER, "class_mean_of_predicted"))
    if decoded and mean and (ahead := mean.decoder_over):
        text += (f". The decoder's maps correlate {decoded.mean:.2f} with the maps that it learns; "
                 f"the mean map of the predicted class correlates {mean.mean:.2f} with them "
                 f"(difference {ahead.mean:+.3f} [{ahead.low:+.3f}, {ahead.high:+.3f}])")
    return text + "."
