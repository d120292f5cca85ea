"""Maps over repeats: means, pairs, images without a correlation, and the sentence."""

from __future__ import annotations

import numpy as np
import pytest

from impactx.evaluation.statistics import CrossedMeans
from impactx.results.evidence_records import OrderAreas
from impactx.results.map_evidence import map_sentence, maps_over_repeats

HOW = {"confidence": 0.9}
LEVELS = {"decoder": 0.3, "shap_predicted": 0.4, "grad_cam_predicted": 0.2, "mean_map": 0.35, "random": 0.1}
PARTS = ("probability.early", "probability.all", "logit.early", "logit.all")


def arrays(repeat: int, images: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(repeat)
    found = {f"fidelity.{name}.{measure}": generator.normal(level, 0.1, images)
             for name, level in (("decoder", 0.5), ("class_mean_of_predicted", 0.2))
             for measure in ("mse", "correlation", "overlap")}
    for name, level in LEVELS.items():
        found |= {f"curve.{name}": np.zeros((images, 65))}
        found |= {f"aopc.{name}.{part}": generator.normal(level, 0.05, images) for part in PARTS}
    return found


def test_orders_are_means_over_repeats_and_images():
    repeats = {0: arrays(0), 1: arrays(1)}
    repeats[1]["curve.only_here"] = np.zeros((40, 65))
    found = maps_over_repeats(repeats, **HOW)
    assert set(found.orders) == set(LEVELS) and found.explainer == "shap_predicted"
    early, everywhere, logit, logits = (CrossedMeans(
        {n: {r: a[f"aopc.{n}.{part}"] for r, a in repeats.items()} for n in LEVELS}, **HOW) for part in PARTS)
    assert found.orders["decoder"] == OrderAreas(
        aopc=early.mean("decoder"), over_random=early.gain("decoder", "random"),
        over_explainer=early.gain("decoder", "shap_predicted"), over_mean_map=early.gain("decoder", "mean_map"),
        all_regions=everywhere.mean("decoder"), logit=logit.mean("decoder"), logit_all_regions=logits.mean("decoder"))
    assert found.orders["random"].over_random is None and found.orders["mean_map"].over_mean_map is None


def test_an_image_without_a_correlation_is_left_out_everywhere():
    repeats = {0: arrays(0), 1: arrays(1)}
    repeats[1]["fidelity.decoder.correlation"][7] = np.nan
    found = maps_over_repeats(repeats, **HOW).fidelity
    kept = np.arange(40) != 7
    assert found["class_mean_of_predicted"]["correlation"].mean == pytest.approx(np.mean(
        [a["fidelity.class_mean_of_predicted.correlation"][kept] for a in repeats.values()]))
    assert (found["decoder"]["correlation"].images, found["decoder"]["mse"].images) == (39, 40)
    assert found["decoder"]["correlation"].decoder_over is None
    assert found["class_mean_of_predicted"]["correlation"].decoder_over.mean == pytest.approx(np.mean(
        [(a["fidelity.decoder.correlation"] - a["fidelity.class_mean_of_predicted.correlation"])[kept]
         for a in repeats.values()]))


def test_the_sentence_says_more_or_less_than_what():
    text = map_sentence("impactx", maps_over_repeats({0: arrays(0)}, **HOW))
    assert "more than with a random order [+0." in text and "less than with the maps of the model itself by shap [-0." in text
    assert "maps correlate 0.5" in text and "mean map of the predicted class correlates 0.2" in text and "(difference +0.3" in text
    assert "less than with one mean map for every image [-0." in text
    bare = {key: value for key, value in arrays(0).items() if ".decoder" in key or key == "curve.decoder"}
    bare = {key: value for key, value in bare.items() if not key.startswith("fidelity")}
    found = maps_over_repeats({0: bare | {"curve.random": bare["curve.decoder"]} | {
        f"aopc.random.{part}": np.zeros(40) for part in PARTS}}, **HOW)
    assert found.fidelity == {} and found.explainer is None and map_sentence("x", found).endswith("].")
