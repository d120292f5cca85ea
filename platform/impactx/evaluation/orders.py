"""The orders that a judgement compares: whose maps, by which attribution, for which class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from impactx.settings import AttributionSettings, EvaluationSettings


@dataclass(frozen=True)
class Order:
    """Maps of an attribution that are judged.

    Attributes:
        name: Under which results and arrays list them.
        attribution: What makes them.
        classes: Whose score is explained: that of the predicted or of the true class.
        of_a: Whether A is explained, and not the judged model itself.
        beside: The order of the same model and attribution whose maps are taken where the classes
            agree, or None.
    """

    name: str
    attribution: AttributionSettings
    classes: Literal["predicted", "true"]
    of_a: bool = False
    beside: str | None = None


def short_name(attribution: AttributionSettings) -> str:
    """Return what names of orders call an attribution."""
    return ("shap" if attribution.method in ("partition", "shap_partition")
            else str(attribution.method))


def order_of_a(attribution: AttributionSettings) -> str:
    """Return the name of the order of an attribution's maps of A for the true class."""
    return f"{short_name(attribution)}_of_a"


def orders_of(settings: EvaluationSettings, attribution: AttributionSettings, *,
              learned: AttributionSettings | None, has_a: bool) -> list[Order]:
    """Return the attributions' maps that a judgement compares, in the order of their making.

    Args:
        settings: Which of them are asked for.
        attribution: The experiment's.
        learned: What made the maps that the model was trained to predict, or None.
        has_a: Whether the model was built on a classifier A.
    """
    orders: list[Order] = []
    predicted = f"{short_name(attribution)}_predicted"
    if "predicted" in settings.orders:
        orders.append(Order(predicted, attribution, "predicted"))
    if "true" in settings.orders:
        orders.append(Order(f"{short_name(attribution)}_true", attribution, "true",
                            beside=predicted if orders else None))
    if "of_a" in settings.orders and has_a:
        taught_by = learned or attribution
        orders.append(Order(order_of_a(taught_by), taught_by, "true", of_a=True))
    for number, other in enumerate(settings.attributions, 1):
        name, taken = f"{short_name(other)}_predicted", {order.name for order in orders}
        orders.append(Order(name if name not in taken else f"{name}_{number}", other, "predicted"))
    return orders
