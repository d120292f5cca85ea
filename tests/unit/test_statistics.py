"""Means over repeats and images, Holm, calibration: against the t test, known truths and definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from impactx.evaluation.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    per_class_accuracy,
)
from impactx.evaluation.resampling import interval_of_mean, resample_images
from impactx.evaluation.statistics import CrossedMeans, half_width, holm, p_value


def hits(seed: int, repeats: int, images: int, level: float = 0.7) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {r: generator.random(images) < level for r in range(repeats)}


def constant(values) -> dict[int, np.ndarray]:
    """Repeats whose every image has the repeat's own value."""
    return {r: np.full(4, v) for r, v in enumerate(values)}


def test_one_repeat_gives_an_interval_of_the_images_alone_and_says_so():
    means = CrossedMeans({"a": hits(0, 1, 400), "b": hits(1, 3, 400)})
    one, three = means.mean("a"), means.mean("b")
    assert (one.over, one.spread, three.over) == ("images", None, "repeats and images")
    test = stats.ttest_1samp(hits(0, 1, 400)[0].astype(float), 0).confidence_interval()
    assert (one.low, one.high) == pytest.approx((test.low, test.high))
    assert three.spread == pytest.approx(np.std([v.mean() for v in hits(1, 3, 400).values()], ddof=1))
    assert one.p is None and means.gain("b", "a").repeats == 1


def test_of_repeats_alone_the_interval_and_p_are_the_paired_t_tests():
    a, b = [0.71, 0.74, 0.70, 0.73, 0.75], [0.70, 0.71, 0.70, 0.71, 0.72]
    gain = CrossedMeans({"a": constant(a), "b": constant(b)}, confidence=0.9).gain("a", "b")
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.9)
    assert (gain.low, gain.high, gain.p) == pytest.approx((interval.low, interval.high, test.pvalue))
    # Two one-sided tests of the margin at 0.05 are that interval of 0.9.
    assert not gain.within(interval.high * 0.999, 0.05) and gain.within(interval.high * 1.001, 0.05)


def test_both_parts_of_the_error_by_hand():
    """What the repeats, the images, and both together do, taken apart by the sums of an analysis of variance."""
    generator, repeats, images = np.random.default_rng(3), 6, 50
    values = (generator.normal(0, 0.05, (repeats, 1)) + generator.normal(0, 0.3, (1, images))
              + generator.normal(0, 0.1, (repeats, images)))
    gain = CrossedMeans({"a": dict(enumerate(values)), "b": dict.fromkeys(range(repeats), np.zeros(images))}
                        ).gain("a", "b")
    rows, columns, mean = values.mean(1), values.mean(0), values.mean()
    rest = ((values - rows[:, None] - columns + mean) ** 2).sum() / (repeats - 1) / (images - 1)
    of_repeats = images * ((rows - mean) ** 2).sum() / (repeats - 1)
    of_images = repeats * ((columns - mean) ** 2).sum() / (images - 1)
    assert gain.error_of_repeats == pytest.approx(math.sqrt(of_repeats / repeats / images))
    assert gain.error_of_images == pytest.approx(math.sqrt((of_images - rest) / repeats / images), rel=1e-3)
    half = math.hypot(stats.t.ppf(0.975, 5) * gain.error_of_repeats, stats.t.ppf(0.975, 49) * gain.error_of_images)
    assert (gain.low, gain.high) == pytest.approx((mean - half, mean + half))
    assert half_width(gain.error_of_repeats, gain.error_of_images, repeats, images, gain.p) == pytest.approx(abs(mean))


def test_repeats_that_are_equal_by_chance_do_not_make_a_gain_certain():
    """Two repeats gain the same 3 of 300 images each, but others: their spread is 0, that of the images is not."""
    better = {r: np.arange(300) // 3 == r for r in range(2)}
    gain = CrossedMeans({"a": better, "b": dict.fromkeys(range(2), np.zeros(300))}).gain("a", "b")
    assert (gain.mean, gain.spread) == (0.01, 0) and gain.low < 0 and gain.p > 0.2


@pytest.mark.parametrize("repeats, images", [(2, 300), (40, 10_000)])
def test_p_is_the_level_at_which_the_interval_begins_to_hold_zero(repeats, images):
    for mean, a, b in [(0.1, 0.01, 0.03), (-0.02, 0.01, 0.001), (0.001, 0.01, 0.02)]:
        assert half_width(a, b, repeats, images, p_value(mean, a, b, repeats, images)) == pytest.approx(abs(mean))
    assert p_value(0.0, 0.0, 0.0, repeats, images) == 1 and p_value(0.1, 0.0, 0.0, repeats, images) == 1e-12
    assert p_value(1e9, 0.01, 0.01, 40, images) == pytest.approx(1e-12, rel=1e-6)


def test_equal_models_gain_nothing_and_pairing_removes_what_they_share():
    a = hits(0, 4, 300)
    better = {r: v | (np.random.default_rng(100 + r).random(300) < 0.1) for r, v in a.items()}
    means = CrossedMeans({"a": a, "same": dict(a), "better": better})
    same, gain = means.gain("same", "a"), means.gain("better", "a")
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    width = means.mean("better").high - means.mean("better").low
    assert gain.low > 0 and gain.p < 0.02 and gain.high - gain.low < width / 2
    opposite = means.gain("a", "better")
    assert (opposite.mean, opposite.high, opposite.p) == pytest.approx((-gain.mean, -gain.low, gain.p))


def test_repeats_are_paired_by_their_number():
    a, b = hits(0, 3, 50), hits(1, 3, 50)
    whole = CrossedMeans({"a": a, "b": {2: b[2], 1: b[1], 7: b[0]}})
    alone = CrossedMeans({"a": {1: a[1], 2: a[2]}, "b": {1: b[1], 2: b[2]}})
    assert whole.gain("a", "b") == alone.gain("a", "b") and whole.gain("a", "b").repeats == 2
    assert CrossedMeans({"a": {0: a[0]}, "b": {1: b[1]}}).gain("a", "b") is None


@pytest.mark.parametrize("values", [{}, {"a": {}}, {"a": {0: np.zeros(3)}, "b": {0: np.zeros(4)}},
                                    {"a": {0: np.zeros(0)}}])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match="at least one repeat"):
        CrossedMeans(values)


def simulate(generator, repeats, images, of_repeats, of_images, rest):
    """Differences with a true mean of 0: effects of repeats, of images, and of both together."""
    whole = (generator.normal(0, of_repeats, (repeats, 1)) + generator.normal(0, of_images, (1, images))
             + generator.normal(0, rest, (repeats, images)))
    return {"a": dict(enumerate(whole)), "b": dict.fromkeys(range(repeats), np.zeros(images))}


@pytest.mark.parametrize("repeats, of_repeats, of_images, rest", [
    (1, 0.0, 0.4, 0.3),    # one repeat whose training has no spread: the images' interval is enough
    (2, 0.1, 0.1, 0.1),    # the trainings' spread dominates
    (5, 0.1, 0.1, 0.1),
    (5, 0.0, 0.4, 0.1),    # the images dominate
    (5, 0.03, 0.4, 0.2),   # both count
    (10, 0.03, 0.1, 0.4)])
def test_intervals_cover_the_truth(repeats, of_repeats, of_images, rest):
    generator, inside, trials = np.random.default_rng(5), 0, 2000
    for _ in range(trials):
        gain = CrossedMeans(simulate(generator, repeats, 200, of_repeats, of_images, rest)).gain("a", "b")
        inside += gain.low <= 0 <= gain.high
        assert (gain.p < 0.05) == (not gain.low <= 0 <= gain.high)
    assert inside / trials >= 0.94, inside / trials  # 0.95 less two standard errors of 2000 trials


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_p_values_are_right_at_the_levels_that_a_correction_reads(repeats):
    """Trainings that differ by chance alone: p < level in that share of experiments, as deep as Holm over 9 cells."""
    generator, trials = np.random.default_rng(repeats), 4000
    nothing = constant(np.zeros(repeats))
    p = np.array([CrossedMeans({"a": constant(generator.normal(size=repeats)), "b": nothing}).gain("a", "b").p
                  for _ in range(trials)])
    for level in (0.05, 0.05 / 3, 0.05 / 9):
        assert abs(np.mean(p < level) - level) < 3 * math.sqrt(level * (1 - level) / trials), level


def test_a_seed_repeats_and_blocks_of_resamples_do_not_matter(monkeypatch):
    rows = np.random.default_rng(0).random((3, 40))
    first = resample_images(rows, 50, 1)
    monkeypatch.setattr("impactx.evaluation.resampling._BLOCK", 200)
    assert np.allclose(first, resample_images(rows, 50, 1), rtol=1e-14)
    assert not np.allclose(first, resample_images(rows, 50, 2))
    low, high = interval_of_mean(rows.T, resamples=50, seed=1)
    assert low == pytest.approx(np.quantile(first, 0.025, 1)) and high == pytest.approx(np.quantile(first, 0.975, 1))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def predictions(seed=0, images=500, classes=4):
    generator = np.random.default_rng(seed)
    scores = generator.normal(0, 2, (images, classes))
    scores[:5] = [50, 0, 0, 0]  # a confidence of exactly 1
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return p.astype(np.float32), generator.integers(0, classes, images)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_plain_definition(bins):
    p, labels = predictions()
    expected = 0.0
    for b in range(bins):
        inside = [i for i in range(len(p)) if b / bins < float(p[i].max()) <= (b + 1) / bins]
        if inside:
            accuracy = np.mean([p[i].argmax() == labels[i] for i in inside])
            confidence = np.mean([float(p[i].max()) for i in inside])
            expected += len(inside) / len(p) * abs(accuracy - confidence)
    assert expected_calibration_error(p, labels, bins) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_a_calibrated_model_has_no_calibration_error():
    assert expected_calibration_error(np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([0, 1])) == 0
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1


def test_likelihood_and_class_accuracies():
    p, labels = predictions()
    assert negative_log_likelihood(p, labels) == pytest.approx(
        -sum(math.log(p[i, labels[i]]) for i in range(len(p))) / len(p), rel=1e-6)
    assert math.isfinite(negative_log_likelihood(np.array([[1.0, 0.0]], np.float32), np.array([1])))
    p = np.eye(3, dtype=np.float32)[[0, 0, 1, 1]]
    assert per_class_accuracy(p, np.array([0, 1, 1, 1])) == [1.0, pytest.approx(2 / 3), None]
