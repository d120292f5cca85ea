"""The maps as explanations, in words: names of orders, and what a model's own map is worth."""

from __future__ import annotations

from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.metrics.morf import LEAST, RANDOM
from impactx.evaluation.statistics import Estimate
from impactx.report.numbers import NONE, Bounds, points
from impactx.report.style import shown
from impactx.results.evidence_records import MapEvidence

OWN = ("decoder", "attention")  # maps that a model makes itself, in one forward pass
_MEAN = "one mean map for every image"


def order_name(order: str, approach: str) -> str:
    """Return the name of an order for readers.

    Args:
        order: As in the results, such as "shap_predicted". The name always says which model and
            which class are explained.
        approach: Whose model is judged.
    """
    names = {"decoder": f"{shown(approach)}'s own map",
             "attention": f"{shown(approach)}'s attention", "mean_map": "mean training map",
             RANDOM: "random order", LEAST: "least relevant first"}
    for end, words in (("_predicted", "of this model, predicted class"),
                       ("_true", "of this model, true class"), ("_of_a", "of A, true class")):
        if order.endswith(end):
            method = order.removesuffix(end)
            return f"{'SHAP' if method == 'shap' else method.replace('_', ' ')} {words}"
    return names.get(order, order.replace("_", " "))


def sentence(maps: MapEvidence, quality: MapQuality, approach: str) -> str:
    """Return what the model's own map is worth, in words; an attribution's where it makes none.

    Args:
        maps: Over all repeats.
        quality: Of one model, for the costs.
        approach: Whose maps they are.
    """
    main = next((order for order in (*OWN, maps.explainer, *maps.orders)
                 if order in maps.orders and order != LEAST and maps.orders[order].over_random),
                None)
    over_random = maps.orders[main].over_random if main is not None else None
    if main is None or over_random is None:
        return "No map here can be judged against a random order."
    name, areas = order_name(main, approach), maps.orders[main]
    text = (f"{name[:1].upper()}{name[1:]} {_worth(over_random, areas.over_mean_map)}: the area "
            f"over its MoRF curve (first 16 % of the regions) is {_change(over_random)} of a "
            "random order's")
    if areas.over_mean_map:
        text += f", {_change(areas.over_mean_map)} of that of {_MEAN}"
    if areas.over_explainer and maps.explainer:
        text += (f", and {_change(areas.over_explainer)} of that by "
                 f"{order_name(maps.explainer, approach)}")
    return " ".join(filter(None, (
        f"{text}.", _agreement(maps), _cost(quality, main, maps.explainer, approach))))


def _worth(over_random: Estimate, over_mean: Estimate | None) -> str:
    """Return how a map compares with chance and with the map that is the same for all images."""
    if over_random.high < 0:
        return "is worse than a random order"
    if over_random.low <= 0:
        return "cannot be told from a random order"
    if over_mean is None:
        return "finds what the model looks at better than chance does"
    if over_mean.low > 0:
        return f"finds what the model looks at better than chance and {_MEAN} do"
    worse = "worse" if over_mean.high < 0 else "not surely better"
    return f"is better than chance, but {worse} than {_MEAN}"


def _agreement(maps: MapEvidence) -> str:
    """Return how the decoder compares with the best prediction without a look at the image.

    That is the mean map of the predicted class.
    """
    mean = maps.fidelity.get("class_mean_of_predicted", {}).get("correlation")
    ahead = mean.decoder_over if mean else None
    if ahead is None:
        return ""
    worth = ("more than" if ahead.low > 0 else "less than" if ahead.high < 0
             else "no more, as far as can be told, than")
    return (f"Its maps agree with those that it learns {worth} the mean map of the predicted class "
            f"does (correlation {estimated(ahead, sign=True)}).")


def _change(gap: Estimate) -> str:
    side = "ahead" if gap.mean >= 0 else "short"
    return f"{100 * abs(gap.mean):.1f} points {side} {signed_bounds(gap)}"


def signed(gap: Estimate) -> str:
    """Return a difference of probabilities in points."""
    return points(gap.mean, 1)


def signed_bounds(gap: Estimate) -> str:
    """Return the interval of a difference of probabilities in points."""
    return f"[{points(gap.low, 1)}, {points(gap.high, 1)}]"


def _cost(quality: MapQuality, main: str, explainer: str | None, approach: str) -> str:
    seconds, evaluations = quality.seconds_per_map, quality.evaluations_per_map
    if main not in OWN or main not in seconds or explainer is None or explainer not in seconds:
        return ""
    return (f"One such map costs one forward pass ({1000 * seconds[main]:.2f} ms), one by "
            f"{order_name(explainer, approach)} "
            f"{evaluations.get(explainer) or 'an unknown number'} "
            f"({1000 * seconds[explainer]:.0f} ms): "
            f"{seconds[explainer] / seconds[main]:,.0f} times as long.")


def estimated(estimate: Bounds | None, *, sign: bool = False) -> str:
    """Return a mean with its interval, as 0.512 [0.480, 0.544].

    Args:
        estimate: None gives a dash.
        sign: Whether positive values have a sign.
    """
    if estimate is None:
        return NONE
    low, mean, high = (f"{value:{'+' if sign else ''}.3f}"
                       for value in (estimate.low, estimate.mean, estimate.high))
    return f"{mean} [{low}, {high}]".replace("-", "−")
