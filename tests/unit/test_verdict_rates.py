"""Simulated jobs of 2 to 40 repeats: no verdict is wrong more often than its level allows.

Trainings vary as normal, heavy-tailed (Student's t with 3 degrees of freedom) or skewed (exponential) numbers. The gains
of one approach are correlated, as all subtract from the same training. `python tests/unit/test_verdict_rates.py` prints
all rates.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from impactx.evaluation.pooling import CellGain, common_effect
from impactx.evaluation.power import detectable, repeats_for
from impactx.evaluation.statistics import Parts, estimate
from impactx.results.evidence_records import Gain
from impactx.results.verdicts import Claim, Rules, decide

LEVEL, JOBS, IMAGES = 0.05, 2000, 10_000
REPEATS = (2, 3, 5, 10, 20, 40)
NOISES = {"normal": lambda g, shape: g.normal(size=shape),
          "heavy tails": lambda g, shape: g.standard_t(3, shape) / math.sqrt(3),
          "skewed": lambda g, shape: g.exponential(size=shape) - 1}


def gain(values: np.ndarray) -> Gain:
    return Gain(**estimate(values, IMAGES).as_dict())


def claims(noise, generator, repeats: int, true: tuple[float, float, float], count: int = 1) -> list[Claim]:
    """An approach beside A and two controls, over which it truly gains `true`, in so many cells."""
    found = []
    for _ in range(count):
        ours, *others = noise(generator, (4, repeats))
        over_a, *controls = (gain(ours - other + effect) for other, effect in zip(others, true, strict=True))
        found.append(Claim(controls, over_a, complete=True))
    return found


def rates(noise: str, repeats: int, true, *, count: int = 1, margin: float = 1.0, jobs: int = JOBS) -> dict[str, float]:
    """In which share of jobs at least one verdict is of each kind."""
    generator, seen = np.random.default_rng([repeats, count]), dict.fromkeys(("helps", "hurts", "no difference"), 0)
    for _ in range(jobs):
        made = decide(claims(NOISES[noise], generator, repeats, true, count))
        for kind in {decision.kind(Rules(LEVEL, margin)) for decision in made} - {"cannot be told"}:
            seen[kind] += 1
    return {kind: number / jobs for kind, number in seen.items()}


def most(level: float, jobs: int = JOBS) -> float:
    """The level, and three standard errors of so many jobs."""
    return level + 3 * math.sqrt(level * (1 - level) / jobs)


ERROR = math.sqrt(2)  # the standard deviation of the difference of two trainings
FAR = 100.0
HARDEST = {
    "one reference is equal, the others are far worse": (FAR, 0.0, FAR),
    "A is equal, the controls are far worse": (0.0, FAR, FAR),
    "both controls are equal": (FAR, 0.0, 0.0)}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("true", HARDEST.values(), ids=HARDEST)
def test_neither_help_nor_harm_is_seen_where_there_is_none(noise, repeats, true):
    found = rates(noise, repeats, true)
    # The level is shared by the two directions.
    assert found["helps"] <= most(LEVEL / 2) and found["hurts"] <= most(LEVEL / 2)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("repeats", REPEATS)
def test_over_cells_and_approaches_the_whole_job_keeps_the_level(noise, repeats):
    for true in ("both controls are equal", "one reference is equal, the others are far worse"):
        found = rates(noise, repeats, HARDEST[true], count=4, jobs=800)
        assert found["helps"] + found["hurts"] <= most(LEVEL, 800)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_difference_as_large_as_the_margin_is_not_called_smaller(noise, repeats, sign):
    margin = 4 * ERROR / math.sqrt(repeats)
    found = rates(noise, repeats, (FAR, sign * margin, 0.0), margin=margin)
    # Where it helps or hurts, it is also not called smaller.
    assert found["no difference"] <= most(LEVEL)


def test_true_effects_are_found():
    """The rates above are not kept by verdicts that never come."""
    effect = 1.5 * ERROR
    assert rates("normal", 10, (effect, effect, effect))["helps"] > 0.8
    assert rates("normal", 10, (FAR, -effect, 0.0))["hurts"] > 0.8
    assert rates("normal", 10, (FAR, 0.0, 0.0), margin=effect)["no difference"] > 0.8


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("of_images", [0.0, 0.3])
def test_the_difference_with_80_percent_power_has_it(repeats, of_images):
    """Of the test that the verdicts make, with what the images add to it."""
    generator = np.random.default_rng(repeats)
    values = generator.normal(size=(4000, repeats))
    exact = (values[0] - values[0].mean()) / values[0].std(ddof=1)
    true = detectable(estimate(exact, IMAGES, of_images=of_images), LEVEL)
    moved = generator.normal(0, of_images, 4000)
    seen = np.mean([estimate(row + shift + true, IMAGES, of_images=of_images).low > 0
                    for row, shift in zip(values, moved, strict=True)])
    assert seen == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / 4000))


@pytest.mark.parametrize("margin", [0.6, 1.0, 3.0])
def test_the_repeats_for_the_margin_show_it_either_way_and_fewer_do_not(margin):
    generator = np.random.default_rng(1)
    pilot = np.array([-1.0, 0.0, 1.0])  # a spread of 1
    number = repeats_for(estimate(pilot, IMAGES), margin, LEVEL, LEVEL)

    def shares(count: int) -> tuple[float, float]:
        found = [estimate(generator.normal(size=count), IMAGES) for _ in range(4000)]
        return (np.mean([one.low + margin > 0 for one in found]), np.mean([one.within(margin, LEVEL) for one in found]))

    error = 3 * math.sqrt(0.16 / 4000)
    assert min(shares(number)) >= 0.8 - error and min(shares(number - 1)) <= 0.8 + error


def test_more_repeats_do_not_help_where_the_images_are_too_few():
    blurred = estimate(np.array([-0.01, 0.0, 0.01]), IMAGES, of_images=1.0)
    assert repeats_for(blurred, 1.0, LEVEL, LEVEL) is None
    assert detectable(blurred, LEVEL) > 2 and detectable(estimate(np.zeros(3), IMAGES), LEVEL) == 0


def cell(values: np.ndarray, of: tuple[str, str] = ("impactx", "lambda0"), first: int = 0) -> CellGain:
    return CellGain(of, range(first, first + len(values)), Parts(values, 0.0, 0.0), IMAGES)


@pytest.mark.parametrize("cells, repeats, between", [
    (2, 2, 0.0), (2, 5, 0.0), (4, 3, 0.0), (4, 20, 0.0),   # of these cells, whose repeats may share what they vary by
    (5, 2, 0.0), (5, 5, 1.0), (9, 3, 0.3), (9, 20, 2.0)])  # of cells like these
def test_a_common_effect_is_not_seen_where_there_is_none(cells, repeats, between):
    generator, wrong = np.random.default_rng([cells, repeats]), 0
    for _ in range(JOBS):
        shared = generator.normal(size=repeats) if cells < 5 else 0.0
        spreads = np.linspace(1, 3, cells)
        gains = {str(c): cell(spreads[c] * (generator.normal(size=repeats) + shared) + generator.normal(0, between))
                 for c in range(cells)}
        wrong += common_effect(gains, 1 - LEVEL).p < LEVEL
    assert wrong / JOBS <= most(LEVEL)


def test_few_cells_are_averaged_repeat_by_repeat_and_say_nothing_of_how_cells_differ():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([9.0, 3.0, 3.0, 7.0])
    found = common_effect({"x": cell(a), "y": cell(b, first=1)}, 0.95)  # both have repeats 1 and 2
    assert found.mean == np.mean([(2 + 9) / 2, (4 + 3) / 2]) and found.between is None and found.cells == ["x", "y"]
    assert common_effect({"x": cell(a), "y": cell(b, first=7)}, 0.95) is None


def test_five_cells_tell_how_cells_differ():
    generator = np.random.default_rng(0)
    cells = {str(c): cell(true + generator.normal(0, 0.1, 10)) for c, true in enumerate((1.0, 2.0, 3.0, 4.0, 5.0))}
    found = common_effect(cells, 0.95)
    assert found.between == pytest.approx(np.std([1, 2, 3, 4, 5], ddof=1), rel=0.05)
    same = {name: cell(np.array([0.0, 1.0])) for name in "abcde"}
    assert common_effect(same, 0.95).between == 0


def test_cells_of_different_approaches_are_not_pooled():
    with pytest.raises(ValueError, match="different approaches have no common effect: x: impactx over lambda0, y: abn"):
        common_effect({"x": cell(np.zeros(2)), "y": cell(np.zeros(2), of=("abn", "lambda0"))}, 0.95)


if __name__ == "__main__":
    JOBS = 4000
    for noise in NOISES:
        for repeats in REPEATS:
            margin = 4 * ERROR / math.sqrt(repeats)
            one, six = (rates(noise, repeats, HARDEST["both controls are equal"], count=n, jobs=JOBS) for n in (1, 6))
            hardest = rates(noise, repeats, (FAR, 0.0, FAR), jobs=JOBS)["helps"]
            at = rates(noise, repeats, (FAR, margin, 0.0), margin=margin, jobs=JOBS)["no difference"]
            print(f"{noise:12} {repeats:3} repeats: helps {hardest:.3f}  hurts {one['hurts']:.3f}  "
                  f"six cells {six['helps'] + six['hurts']:.3f}  margin {at:.3f}", flush=True)
