"""What finished rows show: gains with intervals, their correction over cells, the plain sentence, what is missing."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from pydantic import ValidationError

from impactx.evaluation.power import detectable, repeats_for
from impactx.evaluation.statistics import CrossedMeans, holm
from impactx.results.evidence import evidence, roles, sentences
from impactx.results.evidence_records import Evidence, Gain
from impactx.results.pilot import proposal
from impactx.results.records import Look, Start
from impactx.results.rows import Row
from impactx.settings import ExperimentSettings
from impactx.storage import Storage

IMAGES, CLASSES = 2000, 4
SETTINGS = {"attribution": {"method": "partition"}, "approaches": {
    "impactx": {"kind": "impactx", "lambdas": [0.8]}, "lambda0": {"kind": "impactx", "lambdas": [0.0]},
    "shuffled": {"kind": "impactx", "lambdas": [0.8], "maps": "shuffled"}, "other": {"kind": "abn"}}}


def find(storage, rows, settings=SETTINGS, starts=(), **evaluation):
    """What these rows show, by these approaches."""
    return evidence(storage, rows, experiment(settings, **evaluation), starts)


def experiment(settings, **evaluation) -> ExperimentSettings:
    return ExperimentSettings.model_validate(settings | {
        "datasets": {"cifar10": {"name": "cifar10"}},
        "models": {"lenet5": {"name": "lenet5", "architecture": "lenet5"}}, "evaluation": evaluation})


class Lab:
    """Rows and their test units' predictions, as a job leaves them."""

    def __init__(self, folder) -> None:
        self.storage, self.rows = Storage(folder), []

    def add(self, approach, level, *, weight=None, repeats=5, dataset="cifar10", seed=0, images=IMAGES):
        """Models that classify an image right where a number of its own (the same for all) is below the level."""
        labels = np.random.default_rng(1).integers(0, CLASSES, images)
        hardness = np.random.default_rng(2).random(images)
        for repeat in range(repeats):
            noise = np.random.default_rng([seed, repeat, len(self.rows)]).normal(0, 0.02, images)
            right = hardness + noise < level
            scores = np.full((images, CLASSES), 0.1, np.float32)
            scores[np.arange(images), np.where(right, labels, (labels + 1) % CLASSES)] = 0.7
            folder = f"tests/{dataset}-{approach}-{repeat}"
            stream = io.BytesIO()
            np.savez_compressed(stream, labels=labels, probabilities=scores)
            self.storage.write(f"{folder}/predictions.npz", stream.getvalue())
            self.rows.append(Row(dataset, "lenet5", approach, repeat, weight, 0.001, 32, 0.1, 0.7, float(right.mean()),
                                 images, 12, 10.0, None, f"models/{approach}{repeat}", folder, None, None, None,
                                 f"models/{approach}{repeat}", "w"))
        return self

    def cell(self, index=0, **how):
        return find(self.storage, self.rows, **how).cells[index]

    def hits(self, approach, dataset="cifar10"):
        found = {}
        for row in self.rows:
            if (row.approach, row.dataset) == (approach, dataset):
                with np.load(io.BytesIO(self.storage.read(f"{row.test}/predictions.npz"))) as held:
                    found[row.repeat] = held["probabilities"].argmax(1) == held["labels"]
        return found


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def test_a_gain_is_the_paired_one_and_everything_is_plain_data(lab):
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add("lambda0", 0.65, weight=0.0)
    found = find(lab.storage, lab.rows)
    plain = found.as_json()
    assert json.loads(json.dumps(plain)) == plain and Evidence.from_json(plain) == found
    (cell,) = found.cells
    assert cell.test_images == IMAGES and not cell.missing
    base, ours, control = cell.approaches
    assert (base.gains, list(ours.gains), list(control.gains)) == ({}, ["baseline", "lambda0"], ["baseline"])
    by_hand = CrossedMeans({"a": lab.hits("baseline"), "x": lab.hits("impactx"), "0": lab.hits("lambda0")})
    gain = by_hand.gain("x", "0").as_dict()
    assert ours.gains["lambda0"] == Gain(**gain)
    assert plain["cells"][0]["approaches"][1]["gains"]["lambda0"] == gain
    assert ours.accuracy.mean == pytest.approx(np.mean([r.test_accuracy for r in lab.rows[5:10]]))
    assert ours.ece.mean == pytest.approx(abs(ours.accuracy.mean - 0.7), abs=0.01)
    assert ours.nll.spread > 0 and len(ours.per_class) == CLASSES and ours.repeats == [0, 1, 2, 3, 4]


def test_predictions_damaged_anywhere_are_named_and_the_others_used(lab):
    lab.add("baseline", 0.6, repeats=2, images=500)
    path = f"{lab.rows[0].test}/predictions.npz"
    whole, named = lab.storage.read(path), 0
    for start in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[start:start + 64] = bytes(len(damaged[start:start + 64]))
        lab.storage.write(path, bytes(damaged))
        cell = lab.cell()
        if cell.missing:
            named += 1
            (line,) = cell.missing
            assert line.startswith(f"baseline repeat 0: {lab.storage.uri(path)} is damaged")
            assert cell.approaches[0].repeats == [1]
    assert named > 10


def test_the_sentence_says_whether_the_explanations_help(lab):
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add("lambda0", 0.65, weight=0.0)
    lab.add("shuffled", 0.65, weight=0.8)
    cell = lab.cell()
    assert cell.verdicts["impactx"].verdict == "helps" and set(cell.verdicts) == {"impactx"}
    assert cell.sentence.startswith("The explanations help: impactx gains +") and "over A; +" in cell.sentence
    assert "lambda = 0; +" in cell.sentence and cell.sentence.endswith("shuffled among the images.")
    assert sentences(find(lab.storage, lab.rows)) == f"cifar10 x lenet5: {cell.sentence}"


@pytest.mark.parametrize("ours, control, verdict, begins", [
    (0.7, 0.7, "no difference", "The explanations make no difference larger than 3 points: impactx gains +10"),
    (0.615, 0.6, "helps", "The explanations help, by less than 3 points over its controls: impactx gains"),
    (0.6, 0.7, "hurts", "The explanations hurt: impactx gains"),
    (0.7, 0.715, "hurts", "The explanations hurt, by less than 3 points over its controls: impactx gains")])
def test_the_verdict_depends_on_the_gains_and_the_margin(lab, ours, control, verdict, begins):
    lab.add("baseline", 0.6).add("impactx", ours, weight=0.8, repeats=5).add("lambda0", control, weight=0.0, seed=9)
    lab.add("shuffled", control, weight=0.8)
    found = lab.cell(margin=3).verdicts["impactx"]
    assert found.verdict == verdict and found.sentence.startswith(begins)


def test_what_cannot_be_told_says_what_could_have_been_shown_and_which_repeats_would(lab):
    lab.add("baseline", 0.6).add("impactx", 0.601, weight=0.8).add("lambda0", 0.6, weight=0.0).add("shuffled", 0.6, weight=0.8)
    found = lab.cell(margin=0.05)
    verdict = found.verdicts["impactx"]
    gains = [found.approaches[1].gains[control] for control in ("lambda0", "shuffled")]
    could = max(detectable(gain, 0.05) for gain in gains)
    repeats = max(repeats_for(gain, 0.0005, 0.05, 0.05) for gain in gains)
    assert verdict.verdict == "cannot be told" and verdict.sentence.startswith("5 repeats cannot tell whether")
    assert (verdict.detectable, verdict.repeats_for_margin) == (pytest.approx(could), repeats)
    assert f"could have shown a difference from its controls of {100 * could:.2f} points with 80 % power" in verdict.sentence
    assert f"about {repeats} repeats would show 0.05 points, or that no difference is larger." in verdict.sentence
    assert "Holm" not in verdict.sentence and verdict.p_helps_holm is None


def test_a_gain_over_the_controls_that_is_none_over_a_is_no_help(lab):
    lab.add("baseline", 0.7).add("impactx", 0.7, weight=0.8).add("lambda0", 0.6, weight=0.0).add("shuffled", 0.6, weight=0.8)
    assert lab.cell().verdicts["impactx"].verdict == "cannot be told"


@pytest.mark.parametrize("margin", [0, -0.5, 100])
def test_a_margin_of_nothing_or_less_is_refused(margin):
    with pytest.raises(ValidationError, match="evaluation.margin"):
        experiment(SETTINGS, margin=margin)


def test_one_repeat_and_no_control_are_said(lab):
    lab.add("baseline", 0.6, repeats=1).add("impactx", 0.7, weight=0.8, repeats=1)
    cell = lab.cell()
    assert cell.verdicts["impactx"].verdict == "cannot be told" and "no control was run" in cell.sentence
    assert "with one repeat, the intervals leave out" in cell.sentence


def test_one_repeat_claims_nothing_whatever_it_gains(lab):
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add("lambda0", 0.6, weight=0.0)
    lab.add("shuffled", 0.6, weight=0.8, repeats=1)  # the others have their five
    found = lab.cell().verdicts["impactx"]
    assert found.verdict == "cannot be told" and "One repeat cannot show whether the explanations help" in found.sentence
    assert "--pilot" in found.sentence and found.detectable is None


@pytest.mark.parametrize("control, weight, absent", [
    ("lambda0", 0.0, "maps shuffled among the images"), ("shuffled", 0.8, "the same network with lambda = 0")])
def test_without_both_controls_nothing_helps(lab, control, weight, absent):
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add(control, 0.6, weight=weight)
    found = lab.cell().verdicts["impactx"]
    assert found.verdict == "cannot be told" and f"was not compared with {absent}" in found.sentence


def test_what_an_approach_is_depends_on_its_settings_and_not_on_its_name(lab):
    impactx = {"kind": "impactx", "lambdas": [0.8]}
    approaches = {"ours": impactx, "no_maps": impactx | {"lambdas": [0.0], "learning_rate_factors": [1.0, 2.0]},
                  "shuffled_08": impactx | {"maps": "shuffled"}, "mean": impactx | {"maps": "mean"},
                  "gradients": impactx | {"attribution": {"method": "gradient_shap"}},
                  "same": impactx | {"attribution": {"method": "partition"}},
                  "at_once": {"kind": "single_stage", "lambdas": [0.4, 0.8]}, "wae": {"kind": "wae"}}
    settings = SETTINGS | {"approaches": approaches}
    assert {name: (role.kind, role.candidates) for name, role in roles(experiment(settings)).items()} == {
        "baseline": ("a", None), "ours": ("explained", 1), "no_maps": ("no_maps", 2), "shuffled_08": ("shuffled", 1),
        "mean": ("control", 1), "gradients": ("control", 1), "same": ("explained", 1), "at_once": ("explained", 2),
        "wae": ("other", 1)}
    lab.add("baseline", 0.6).add("ours", 0.7, weight=0.8).add("no_maps", 0.6, weight=0.0)
    lab.add("shuffled_08", 0.6, weight=0.8).add("mean", 0.7, weight=0.8).add("gradients", 0.7, weight=0.8)
    cell = lab.cell(settings=settings)
    assert list(cell.verdicts) == ["ours"] and cell.verdicts["ours"].verdict == "helps"
    assert list(cell.approaches[1].gains) == ["baseline", "no_maps", "shuffled_08"]


def test_a_longer_search_is_said(lab):
    searched = {"impactx": {"kind": "impactx", "lambdas": [0.4, 0.8]}}
    settings = SETTINGS | {"approaches": SETTINGS["approaches"] | searched}
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add("lambda0", 0.6, weight=0.0)
    said = "impactx was chosen from 2 candidates, lambda0 from 1, so the longer search is a part of the gain over it"
    assert said in lab.cell(settings=settings).sentence and said not in lab.cell().sentence


def test_only_a_and_controls_have_no_verdict(lab):
    cell = lab.add("baseline", 0.6).add("lambda0", 0.6, weight=0.0).add("shuffled", 0.6, weight=0.8).cell()
    assert cell.verdicts == {} and "No finished model has learned" in cell.sentence


def test_holm_runs_over_the_verdicts_of_cells_and_approaches(lab):
    levels = {"one": 0.603, "two": 0.602, "three": 0.7}
    settings = SETTINGS | {"approaches": SETTINGS["approaches"] | {"second": {"kind": "impactx", "lambdas": [0.4]}}}
    for dataset, ours in levels.items():
        lab.add("baseline", 0.6, dataset=dataset).add("impactx", ours, weight=0.8, dataset=dataset, seed=1)
        lab.add("lambda0", 0.6, dataset=dataset, weight=0.0).add("shuffled", 0.6, dataset=dataset, weight=0.8)
    lab.add("second", 0.601, dataset="one", weight=0.4)
    found = find(lab.storage, lab.rows, settings=settings)
    verdicts = [verdict for cell in found.cells for verdict in cell.verdicts.values()]
    assert len(verdicts) == 4
    for corrected, plain in (("p_helps_holm", "p_helps"), ("p_hurts_holm", "p_hurts")):
        assert [getattr(v, corrected) for v in verdicts] == holm([getattr(v, plain) for v in verdicts])
    gains = found.cells[0].approaches[1].gains.values()
    assert verdicts[0].p_helps == max(gain.p for gain in gains)
    assert "corrected over the 4 verdicts of the job (Holm), p = " in verdicts[0].sentence
    (effect, *_) = [e for e in found.common if (e.approach, e.over) == ("impactx", "lambda0")]
    assert effect.cells == [f"{name} x lenet5" for name in levels] and effect.between is None
    means = [cell.approaches[1].gains["lambda0"].mean for cell in found.cells]
    assert effect.mean == pytest.approx(np.mean(means)) and {e.approach for e in found.common} == {"impactx"}
    assert f"impactx over lambda0 in 3 cells: {100 * effect.mean:+.2f} points [" in sentences(found)
    assert "so few cannot tell how much cells differ" in sentences(found)


def test_two_controls_are_two_chances_to_be_worse(lab):
    lab.add("baseline", 0.5).add("impactx", 0.6, weight=0.8)
    lab.add("lambda0", 0.603, weight=0.0).add("shuffled", 0.5, weight=0.8)
    cell = lab.cell()
    assert cell.verdicts["impactx"].p_hurts == 2 * cell.approaches[1].gains["lambda0"].p


def test_the_pilots_repeats_are_left_out_and_looks_are_said(lab):
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add("lambda0", 0.65, weight=0.0)
    lab.add("shuffled", 0.65, weight=0.8)
    plan = Start(repeats=2, pilot=True)
    cell = lab.cell(starts=[plan, Start(repeats=5)])
    assert {tuple(entry.repeats) for entry in cell.approaches} == {(2, 3, 4)}
    assert cell.sentence.endswith("The first 2 repeats were a pilot, which is not counted.")
    assert find(lab.storage, lab.rows, starts=[Start(repeats=5, pilot=True)]).cells == []
    seen = [Start(repeats=3), Start(repeats=5, seen=Look(repeats=3, margin=0.5))]
    text = lab.cell(starts=seen).sentence
    assert "Repeats were added after a look at the results of 3, for which nothing is corrected" in text
    # Results that were seen before they became the pilot are left out with it.
    assert "look" not in lab.cell(starts=[*seen, Start(repeats=3, pilot=True)]).sentence
    assert "look" not in lab.cell(starts=[Start(repeats=5), Start(repeats=5, seen=Look(repeats=5, margin=0.5))]).sentence
    seen = [Start(seen=Look(repeats=5, margin=2))]
    assert "When results were first seen, the margin was 2 points." in lab.cell(starts=seen).sentence
    seen = [Start(seen=Look(repeats=9, margin=0.5))]
    assert "The results of 9 repeats had been seen, and are left out in part." in lab.cell(starts=seen).sentence


def test_a_pilot_proposes_repeats_from_the_spread_and_tells_no_gain(lab):
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add("lambda0", 0.699, weight=0.0)
    lab.add("shuffled", 0.7, weight=0.8)
    settings = experiment(SETTINGS, margin=0.4)
    text = proposal(lab.storage, lab.rows, settings)
    cell = find(lab.storage, lab.rows, margin=0.4).cells[0]
    number = cell.verdicts["impactx"].repeats_for_margin
    assert f"Run repeats={number + 5}: the pilot's 5, which are not counted, and {number} that show" in text
    assert f"impactx over lambda0: {100 * cell.approaches[1].gains['lambda0'].spread:.2f} points" in text
    assert all(f"{100 * gain.mean:.2f}" not in text for gain in cell.approaches[1].gains.values())
    assert int(text.rpartition("it is ")[2].rstrip(".")) > number + 5
    alone = [row for row in lab.rows if row.approach == "baseline"]
    assert proposal(lab.storage, alone, settings).startswith("The pilot cannot propose a number of repeats")
    small = proposal(lab.storage, lab.rows, experiment(SETTINGS, margin=0.0001))
    assert "Not even 10000 repeats would show 0.0001 points" in small


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(lab):
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8, repeats=2).add("other", 0.6, images=50, repeats=1)
    rows = list(lab.rows)
    lab.storage.delete(f"{rows[0].test}/predictions.npz")
    lab.storage.write(f"{rows[1].test}/predictions.npz", b"PK torn")
    cell = find(lab.storage, rows).cells[0]
    told = "\n".join(cell.missing)
    assert f"{rows[0].test}/predictions.npz is missing" in told and "predictions.npz is damaged" in told
    assert "other repeat 0: its predictions are of other test images" in told and len(cell.missing) == 3
    assert [a.approach for a in cell.approaches] == ["baseline", "impactx"]
    # Of the two repeats of impactx none has its A any more.
    assert cell.approaches[1].gains == {} and cell.approaches[0].repeats == [2, 3, 4]
    assert "It cannot be told what impactx gains" in cell.sentence
    nothing = find(lab.storage, rows[:2]).cells[0]
    assert nothing.approaches == [] and len(nothing.missing) == 2


def test_a_single_stage_is_set_against_two_stages_and_controls_of_its_own(lab):
    once = {"kind": "single_stage", "lambdas": [0.8]}
    settings = SETTINGS | {"approaches": SETTINGS["approaches"] | {
        "at_once": once, "at_once0": once | {"lambdas": [0]}}}
    lab.add("baseline", 0.6).add("impactx", 0.7, weight=0.8).add("lambda0", 0.65, weight=0.0)
    lab.add("at_once", 0.62, weight=0.8).add("at_once0", 0.61, weight=0.0)
    cell = lab.cell(settings=settings)
    gains = {entry.approach: entry.gains for entry in cell.approaches}
    assert list(gains["at_once"]) == ["baseline", "impactx", "at_once0"]
    assert list(gains["impactx"]) == ["baseline", "lambda0"] and list(gains["at_once0"]) == ["baseline"]
    by_hand = CrossedMeans({n: lab.hits(n) for n in ("at_once", "impactx")})
    assert gains["at_once"]["impactx"].mean == pytest.approx(by_hand.gain("at_once", "impactx").mean)
    # What it loses against two stages says nothing about its explanations.
    verdict = cell.verdicts["at_once"]
    assert verdict.verdict != "hurts" and "over the same in two stages" in verdict.sentence


def test_a_mean_cost_needs_that_of_every_repeat(lab):
    lab.add("baseline", 0.6, repeats=2)
    row = lab.rows[0].as_dict()
    lab.rows = [Row(**(row | {"repeat": k, "seconds_in_all": 10.0 * k})) for k in (1, 3)]
    assert lab.cell().approaches[0].seconds_in_all == 20
    lab.rows[0] = Row(**(row | {"repeat": 1}))
    assert lab.cell().approaches[0].seconds_in_all is None
