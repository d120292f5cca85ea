"""The maps as explanations, in words: names of orders, and what a model's own map is worth against the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.metrics.morf import LEAST, RANDOM
from impactx.report.numbers import NONE
from impactx.report.style import shown

OWN = ("decoder", "attention")  # what a model makes itself, in one forward pass
_MEAN = "one mean map for every image"


def order_name(order: str, approach: str) -> str:
    """An order for readers. Which model and which class are explained is always said."""
    names = {"decoder": f"{shown(approach)}'s own map", "attention": f"{shown(approach)}'s attention",
             "mean_map": "mean training map", RANDOM: "random order", LEAST: "least relevant first"}
    for end, words in (("_predicted", "of this model, predicted class"), ("_true", "of this model, true class"),
                       ("_of_a", "of A, true class")):
        if order.endswith(end):
            method = order.removesuffix(end)
            return f"{'SHAP' if method == 'shap' else method.replace('_', ' ')} {words}"
    return names.get(order, order.replace("_", " "))


def sentence(maps: Mapping[str, Any], quality: MapQuality, approach: str) -> str:
    """What the model's own map is worth, in words; of an attribution's where it makes none.

    maps: of the evidence, over repeats; quality: of one model, for the costs.
    """
    orders = maps["orders"]
    main = next((order for order in (*OWN, maps["explainer"], *orders)
                 if order in orders and orders[order]["over_random"] and order != LEAST), None)
    if main is None:
        return "There is no map here to be judged against a random order."
    gap, mean, other = (orders[main][key] for key in ("over_random", "over_mean_map", "over_explainer"))
    words = (f"{_capital(order_name(main, approach))} {_worth(gap, mean)}: the area over its MoRF curve (first 16 % of "
             f"the regions) is {_change(gap)} of a random order's")
    if mean:
        words += f", {_change(mean)} of that of {_MEAN}"
    if other:
        words += f", and {_change(other)} of that by {order_name(maps['explainer'], approach)}"
    return " ".join(filter(None, (f"{words}.", _agreement(maps), _cost(quality, main, maps["explainer"], approach))))


def _worth(over_random: Mapping[str, float], over_mean: Mapping[str, float] | None) -> str:
    """A map that says something of its image beats chance, and the map that says the same of all of them."""
    if over_random["high"] < 0:
        return "is worse than a random order"
    if over_random["low"] <= 0:
        return "cannot be told from a random order"
    if over_mean is None:
        return "finds what the model looks at better than chance does"
    if over_mean["low"] > 0:
        return f"finds what the model looks at better than chance and {_MEAN} do"
    return f"is better than chance, but {'worse' if over_mean['high'] < 0 else 'not surely better'} than {_MEAN}"


def _agreement(maps: Mapping[str, Any]) -> str:
    """The decoder against the predictor of its maps that knows no more of an image than it does: its own class."""
    of = maps["fidelity"].get("class_mean_of_predicted", {}).get("correlation")
    if not of or not (gain := of["decoder_over"]):
        return ""
    worth = ("more than" if gain["low"] > 0 else "less than" if gain["high"] < 0 else
             "no more, as far as can be told, than")
    return (f"Its maps agree with those that it learns {worth} the mean map of the predicted class does "
            f"(correlation {estimated(gain, sign=True)}).")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _change(gap: Mapping[str, float]) -> str:
    side = "ahead" if gap["mean"] >= 0 else "short"
    return f"{100 * abs(gap['mean']):.1f} points {side} {signed_bounds(gap)}"


def signed(value: float) -> str:
    """A difference of probabilities in points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def signed_bounds(gap: Mapping[str, float]) -> str:
    """Its interval."""
    return f"[{signed(gap['low'])}, {signed(gap['high'])}]"


def _cost(quality: MapQuality, main: str, explainer: str | None, approach: str) -> str:
    seconds, evaluations = quality.seconds_per_map, quality.evaluations_per_map
    if main not in OWN or main not in seconds or explainer is None or explainer not in seconds:
        return ""
    return (f"One such map costs one forward pass ({1000 * seconds[main]:.2f} ms), one by "
            f"{order_name(explainer, approach)} {evaluations.get(explainer) or 'an unknown number'} "
            f"({1000 * seconds[explainer]:.0f} ms): {seconds[explainer] / seconds[main]:,.0f} times as long.")


def estimated(estimate: Mapping[str, float] | None, *, sign: bool = False) -> str:
    """A mean with its interval."""
    if estimate is None:
        return NONE
    low, mean, high = (f"{estimate[key]:{'+' if sign else ''}.3f}" for key in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]".replace("-", "−")
