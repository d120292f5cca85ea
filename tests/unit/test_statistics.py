"""Means over repeats and images, their bootstrap, Holm, calibration: against slow twins and known truths."""

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
from impactx.evaluation.statistics import (
    TwoLevelBootstrap,
    holm,
    interval_of_mean,
    resample_images,
    students_deviations,
)


def hits(seed: int, repeats: int, images: int, level: float = 0.7) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {r: generator.random(images) < level for r in range(repeats)}


def slow_estimate(a, b, resamples, seed, confidence):
    """Resample by resample, image by image: what `gain` does in one matrix product."""
    repeats, images = len(a), len(a[0])
    image_draws = np.random.default_rng([seed, 0]).integers(0, images, (resamples, images))
    repeat_draws = np.random.default_rng([seed, 1, repeats]).integers(0, repeats, (resamples, repeats))
    difference = [[float(x) - float(y) for x, y in zip(a[r], b[r], strict=True)] for r in range(repeats)]
    mean = sum(map(sum, difference)) / repeats / images
    found, of_repeats = [], []
    for k in range(resamples):
        found.append(sum(difference[r][i] for r in repeat_draws[k] for i in image_draws[k]) / repeats / images)
        of_repeats.append(sum(sum(difference[r]) for r in repeat_draws[k]) / repeats / images)
    error = np.std([sum(d) / images for d in difference], ddof=1) / math.sqrt(repeats) if repeats > 1 else 0.0
    for rank, k in enumerate(sorted(range(resamples), key=lambda k: round(of_repeats[k], 12))):
        student = stats.t.ppf((rank + 0.5) / resamples, repeats - 1) if repeats > 1 else 0.0
        found[k] += mean - of_repeats[k] + error * student
    below, above = sum(v <= 1e-12 for v in found), sum(v >= -1e-12 for v in found)
    p = min(1.0, 2 * min(below + 1, above + 1) / (resamples + 1))
    return mean, np.quantile(found, (1 - confidence) / 2), np.quantile(found, (1 + confidence) / 2), p


@pytest.mark.parametrize("repeats, confidence", [(1, 0.95), (2, 0.9), (5, 0.95)])
def test_a_gain_is_the_slow_bootstraps(repeats, confidence):
    a, b = hits(0, repeats, 30, 0.8), hits(1, repeats, 30, 0.7)
    found = TwoLevelBootstrap({"a": a, "b": b}, resamples=80, seed=4, confidence=confidence).gain("a", "b")
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(slow_estimate(a, b, 80, 4, confidence))
    assert found.low < found.mean < found.high and found.images == 30 and found.repeats == repeats


def test_one_repeat_gives_an_interval_of_the_images_alone_and_says_so():
    bootstrap = TwoLevelBootstrap({"a": hits(0, 1, 400), "b": hits(1, 3, 400)}, resamples=2000)
    one, three = bootstrap.mean("a"), bootstrap.mean("b")
    assert (one.over, one.spread, three.over) == ("images", None, "repeats and images")
    error = math.sqrt(one.mean * (1 - one.mean) / 400)
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert three.spread == pytest.approx(np.std([v.mean() for v in hits(1, 3, 400).values()], ddof=1))
    assert one.p is None and bootstrap.gain("b", "a").repeats == 1


def test_equal_models_gain_nothing_and_pairing_removes_what_they_share():
    a = hits(0, 4, 300)
    better = {r: v | (np.random.default_rng(100 + r).random(300) < 0.1) for r, v in a.items()}
    bootstrap = TwoLevelBootstrap({"a": a, "same": dict(a), "better": better}, resamples=1000)
    same, gain = bootstrap.gain("same", "a"), bootstrap.gain("better", "a")
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    width = bootstrap.mean("better").high - bootstrap.mean("better").low
    assert gain.low > 0 and gain.p < 0.01 and gain.high - gain.low < width / 2
    opposite = bootstrap.gain("a", "better")
    assert (opposite.mean, opposite.high, opposite.p) == pytest.approx((-gain.mean, -gain.low, gain.p), abs=3e-3)


def test_repeats_are_paired_by_their_number():
    a, b = hits(0, 3, 50), hits(1, 3, 50)
    whole = TwoLevelBootstrap({"a": a, "b": {2: b[2], 1: b[1], 7: b[0]}}, resamples=200)
    alone = TwoLevelBootstrap({"a": {1: a[1], 2: a[2]}, "b": {1: b[1], 2: b[2]}}, resamples=200)
    assert whole.gain("a", "b") == alone.gain("a", "b") and whole.gain("a", "b").repeats == 2
    assert TwoLevelBootstrap({"a": {0: a[0]}, "b": {1: b[1]}}, resamples=9).gain("a", "b") is None


def test_a_seed_repeats_and_blocks_of_resamples_do_not_matter(monkeypatch):
    rows = np.random.default_rng(0).random((3, 40))
    first = resample_images(rows, 50, 1)
    monkeypatch.setattr("impactx.evaluation.statistics._BLOCK", 200)
    assert np.allclose(first, resample_images(rows, 50, 1), rtol=1e-14)
    assert not np.allclose(first, resample_images(rows, 50, 2))
    low, high = interval_of_mean(rows.T, resamples=50, seed=1)
    assert low == pytest.approx(np.quantile(first, 0.025, 1)) and high == pytest.approx(np.quantile(first, 0.975, 1))


@pytest.mark.parametrize("values", [{}, {"a": {}}, {"a": {0: np.zeros(3)}, "b": {0: np.zeros(4)}},
                                    {"a": {0: np.zeros(0)}}])
def test_what_cannot_be_resampled_is_refused(values):
    with pytest.raises(ValueError, match="at least one repeat"):
        TwoLevelBootstrap(values)


def simulate(generator, repeats, images, of_repeats, of_images, rest):
    """Differences with a true mean of 0: effects of repeats, of images, and of both together."""
    whole = (generator.normal(0, of_repeats, (repeats, 1)) + generator.normal(0, of_images, (1, images))
             + generator.normal(0, rest, (repeats, images)))
    return {"a": dict(enumerate(whole)), "b": dict.fromkeys(range(repeats), np.zeros(images))}


@pytest.mark.parametrize("repeats, of_repeats, of_images, rest", [
    (1, 0.0, 0.4, 0.3),    # one repeat whose training has no spread: the images' interval is enough
    (5, 0.03, 0.1, 0.4),   # the trainings' spread dominates: 5 repeats
    (3, 0.03, 0.1, 0.4),
    (5, 0.0, 0.4, 0.4),    # the images dominate
    (5, 0.01, 0.2, 0.4)])  # as on CIFAR-10 with these 200 images
def test_intervals_cover_the_truth(repeats, of_repeats, of_images, rest):
    generator, inside, trials = np.random.default_rng(5), 0, 300
    for k in range(trials):
        bootstrap = TwoLevelBootstrap(simulate(generator, repeats, 200, of_repeats, of_images, rest), resamples=400,
                                      seed=k)
        gain = bootstrap.gain("a", "b")
        inside += gain.low <= 0 <= gain.high
        assert (gain.p < 0.045) <= (not gain.low <= 0 <= gain.high)
    assert inside / trials >= 0.92, inside / trials  # 0.95 less two standard errors of 300 trials


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_p_values_are_right_at_the_levels_that_a_correction_reads(repeats):
    """Trainings that differ by chance alone: p < level in that share of experiments, as deep as Holm over 9 cells."""
    generator, images = np.random.default_rng(repeats), 4
    p = []
    for k in range(2000):
        values = {"a": {r: np.full(images, v) for r, v in enumerate(generator.normal(size=repeats))},
                  "b": dict.fromkeys(range(repeats), np.zeros(images))}
        p.append(TwoLevelBootstrap(values, resamples=1000, seed=k).gain("a", "b").p)
    for level in (0.05, 0.05 / 3, 0.05 / 9):
        share, error = np.mean(np.array(p) < level), math.sqrt(level * (1 - level) / len(p))
        assert abs(share - level) < 3 * error, (level, share)


def test_of_repeats_alone_the_interval_and_p_are_the_paired_t_tests():
    a, b = np.array([0.71, 0.74, 0.70, 0.73, 0.75]), np.array([0.70, 0.71, 0.70, 0.71, 0.72])
    gain = TwoLevelBootstrap({name: {r: np.full(3, v) for r, v in enumerate(values)} for name, values in
                              (("a", a), ("b", b))}).gain("a", "b")
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval()
    assert (gain.low, gain.high) == pytest.approx((interval.low, interval.high), rel=1e-2)
    assert gain.p == pytest.approx(test.pvalue, rel=2e-2)
    assert (students_deviations(np.array([0.4]), np.full(9, 0.4)) == 0).all()


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
