"""Whether the explanations help: a verdict and a plain sentence for each approach of a cell.

*Helps* needs every gain to be above 0, over A and over each control, so the largest p counts and
nothing is corrected over them. *Hurts* needs one control that is better, so the smallest p is
multiplied by the number of controls. Both are corrected by Holm's procedure over all verdicts of
the job. *No difference* needs every gain over a control to be within the margin, by two one-sided
tests. Everything else *cannot be told*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from impactx.approaches.baseline import BASELINE
from impactx.approaches.role import CONTROLS, REFERENCES, Role
from impactx.evaluation.power import POWER, detectable, repeats_for
from impactx.evaluation.statistics import holm
from impactx.results.evidence_records import (
    ApproachEvidence,
    CellEvidence,
    Gain,
    Verdict,
    VerdictKind,
)
from impactx.results.map_evidence import map_sentence


@dataclass(frozen=True)
class Rules:
    """By what verdicts are found.

    Attributes:
        level: 1 - confidence: of the two-sided tests, and of each one-sided test of the margin.
        margin: The difference that does not matter, as a fraction of the test images.
    """

    level: float
    margin: float


@dataclass(frozen=True)
class Claim:
    """What one approach of one cell is compared by.

    Attributes:
        controls: The gains over controls.
        over_a: The gain over A; None where A has no results.
        complete: Whether it was compared with A and with every kind of control.
    """

    controls: Sequence[Gain]
    over_a: Gain | None
    complete: bool

    @property
    def gains(self) -> list[Gain]:
        """All gains that must be above 0 where the explanations help."""
        return [*self.controls, *([self.over_a] if self.over_a else [])]

    @property
    def testable(self) -> bool:
        """Whether there is a control, and no gain rests on a single repeat."""
        return bool(self.controls) and min(gain.repeats for gain in self.gains) > 1

    @property
    def p_helps(self) -> float | None:
        """The level at which every gain is above 0."""
        if not (self.testable and self.complete):
            return None
        return max(gain.p if gain.mean > 0 else 1.0 for gain in self.gains)

    @property
    def p_hurts(self) -> float | None:
        """The level at which a gain over a control is below 0, corrected over the controls."""
        if not self.testable:
            return None
        smallest = min(gain.p if gain.mean < 0 else 1.0 for gain in self.controls)
        return min(1.0, len(self.controls) * smallest)

    def within(self, rules: Rules) -> bool:
        """Return whether no gain over a control is larger than the margin, either way."""
        return self.testable and all(
            gain.within(rules.margin, rules.level) for gain in self.controls)


@dataclass(frozen=True)
class Decision:
    """A claim with its p-values, corrected over all claims of a job."""

    claim: Claim
    p_helps: float | None
    p_hurts: float | None
    claims: int

    def kind(self, rules: Rules) -> VerdictKind:
        """Return the verdict."""
        if self.p_helps is not None and self.p_helps < rules.level:
            return "helps"
        if self.p_hurts is not None and self.p_hurts < rules.level:
            return "hurts"
        if self.claim.complete and self.claim.within(rules):
            return "no difference"
        return "cannot be told"


def decide(claims: Sequence[Claim]) -> list[Decision]:
    """Return the claims of a job, corrected by Holm's procedure."""
    helps = _corrected([claim.p_helps for claim in claims])
    hurts = _corrected([claim.p_hurts for claim in claims])
    tested = sum(claim.testable for claim in claims)
    return [Decision(*one, tested) for one in zip(claims, helps, hurts, strict=True)]


def _corrected(p_values: Sequence[float | None]) -> list[float | None]:
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]


def judged(cells: Sequence[CellEvidence], roles: Mapping[str, Role], rules: Rules,
           note: str = "") -> list[CellEvidence]:
    """Return the cells with their verdicts and sentences.

    Args:
        cells: Of one job.
        roles: Of every approach, A included.
        rules: By what verdicts are found.
        note: What a reader must know of the job's repeats; ends every sentence.
    """
    entries = [(i, entry) for i, cell in enumerate(cells) for entry in cell.approaches
               if entry.weight and entry.role == "explained"]
    decisions = decide([claim_of(entry, roles) for _, entry in entries])
    verdicts: dict[int, dict[str, Verdict]] = {}
    for (i, entry), decision in zip(entries, decisions, strict=True):
        verdicts.setdefault(i, {})[entry.approach] = _verdict(entry, roles, decision, rules, note)
    return [_with_sentences(cell, verdicts.get(i, {})) for i, cell in enumerate(cells)]


def _with_sentences(cell: CellEvidence, verdicts: dict[str, Verdict]) -> CellEvidence:
    chosen = verdicts.get("impactx") or next(iter(verdicts.values()), None)
    with_maps = {entry.approach: entry.maps for entry in cell.approaches
                 if entry.approach in verdicts and entry.maps and "decoder" in entry.maps.orders}
    shown = "impactx" if "impactx" in with_maps else next(iter(with_maps), None)
    return cell.model_copy(update={
        "verdicts": verdicts,
        "sentence": chosen.sentence if chosen else (
            "No finished model has learned from explanations."),
        "map_sentence": None if shown is None else map_sentence(shown, with_maps[shown])})


def claim_of(entry: ApproachEvidence, roles: Mapping[str, Role]) -> Claim:
    """Return what an approach of a cell is compared by."""
    return Claim([gain for over, gain in entry.gains.items() if roles[over].kind in CONTROLS],
                 entry.gains.get(BASELINE), not _absent(entry, roles))


def _absent(entry: ApproachEvidence, roles: Mapping[str, Role]) -> list[str]:
    """Return the names of the references with which an approach was not compared."""
    compared = {roles[over].kind for over in entry.gains}
    return [text for kind, text in REFERENCES.items() if kind not in compared]


def _verdict(entry: ApproachEvidence, roles: Mapping[str, Role], decision: Decision, rules: Rules,
             note: str) -> Verdict:
    claim, kind, several = decision.claim, decision.kind(rules), decision.claims > 1
    # The first step of Holm's procedure, which the smallest p of several must pass.
    level = rules.level / max(decision.claims, 1)
    gains = claim.controls if claim.testable else []
    needs = [repeats_for(gain, rules.margin, level, rules.level) for gain in gains]
    possible = [need for need in needs if need is not None]
    verdict = Verdict(
        verdict=kind, sentence="", p_helps=claim.p_helps, p_hurts=claim.p_hurts,
        p_helps_holm=decision.p_helps if several else None,
        p_hurts_holm=decision.p_hurts if several else None,
        detectable=max((detectable(gain, level) for gain in gains), default=None),
        repeats_for_margin=max(possible) if gains and len(possible) == len(needs) else None)
    said = _sentence(entry, roles, decision, rules, verdict)
    return verdict.model_copy(update={"sentence": " ".join(filter(None, (said, note)))})


def _sentence(entry: ApproachEvidence, roles: Mapping[str, Role], decision: Decision, rules: Rules,
              verdict: Verdict) -> str:
    name, claim, margin = entry.approach, decision.claim, f"{100 * rules.margin:g} points"
    gains = f"{name} gains {_numbers(entry, roles, decision, verdict)}."
    remedy = ("approaches.single_stage0={kind: single_stage, lambdas: [0]}"
              if roles[name].at_once else "approach=[impactx,lambda0,shuffled]")
    small = f", by less than {margin} over its controls" if claim.within(rules) else ""
    if verdict.verdict == "helps":
        return f"The explanations help{small}: {gains}"
    if verdict.verdict == "hurts":
        return f"The explanations hurt{small}: {gains}"
    if verdict.verdict == "no difference":
        return f"The explanations make no difference larger than {margin}: {gains}"
    if not entry.gains:
        return f"It cannot be told what {name} gains: the cell has no results of A or of a control."
    if not claim.controls:
        return ("It cannot be told whether the explanations help, because no control was run "
                f"({remedy}). {gains}")
    if not claim.testable:
        return ("One repeat cannot show whether the explanations help, because it does not show "
                f"how much trainings differ (--pilot finds how many repeats can). {gains}")
    if not claim.complete:
        return (f"It cannot be told whether the explanations help, because {name} was not compared "
                f"with {' and '.join(_absent(entry, roles))} ({remedy}). {gains}")
    repeats = min(gain.repeats for gain in claim.gains)
    return (f"{repeats} repeats cannot tell whether the explanations help: {gains} "
            f"{_power(verdict, margin)}")


def _power(verdict: Verdict, margin: str) -> str:
    """Return what these repeats could have shown, and how many would show the margin."""
    share = f"{100 * POWER:g} % power"
    could = ("These repeats could have shown a difference from its controls of "
             f"{100 * (verdict.detectable or 0):.2f} points with {share}; ")
    if verdict.repeats_for_margin is None:
        return could + f"no number of repeats shows {margin} on so few test images."
    return could + (f"about {verdict.repeats_for_margin} repeats would show {margin}, or that no "
                    "difference is larger.")


def _numbers(entry: ApproachEvidence, roles: Mapping[str, Role], decision: Decision,
             verdict: Verdict) -> str:
    """Return the gains, and what a reader must know to interpret them."""
    own = roles[entry.approach]
    parts = [f"{_points(gain)} over {own.over(roles[over])}" for over, gain in entry.gains.items()]
    if any(gain.over == "images" for gain in entry.gains.values()):
        parts.append("with one repeat, the intervals leave out how much trainings differ")
    corrected = [p for p in (verdict.p_helps_holm, verdict.p_hurts_holm) if p is not None]
    if corrected:
        parts.append(f"corrected over the {decision.claims} verdicts of the job (Holm), "
                     f"p = {min(corrected):.2g}")
    parts += [f"{entry.approach} was chosen from {own.candidates} candidates, {over} from "
              f"{candidates}, so the longer search is a part of the gain over it"
              for over in entry.gains
              if (candidates := roles[over].candidates) and candidates < (own.candidates or 0)]
    return "; ".join(parts)


def _points(gain: Gain) -> str:
    return (f"{100 * gain.mean:+.2f} points [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}], "
            f"p = {gain.p:.2g}")
