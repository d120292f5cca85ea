"""Whether the explanations help: a verdict and a plain sentence for each approach of a cell."""

from __future__ import annotations

from collections.abc import Mapping

from impactx.approaches.baseline import BASELINE
from impactx.approaches.role import CONTROLS, REFERENCES, Role
from impactx.results.evidence_records import ApproachEvidence, CellEvidence, Gain, Verdict
from impactx.results.map_evidence import map_sentence

# Fewer repeats do not carry a sentence that claims a difference.
REPEATS_FOR_A_CLAIM = 5


def judged(cell: CellEvidence, roles: Mapping[str, Role], alpha: float) -> CellEvidence:
    """Return the cell with its verdicts and sentences.

    Args:
        cell: Its gains are corrected.
        roles: Of every approach, A included.
        alpha: A difference counts where its corrected p is below this.
    """
    verdicts = {entry.approach: _verdict(entry, roles, alpha) for entry in cell.approaches
                if entry.weight and entry.role == "explained"}
    chosen = verdicts.get("impactx") or next(iter(verdicts.values()), None)
    with_maps = {entry.approach: entry.maps for entry in cell.approaches
                 if entry.approach in verdicts and entry.maps and "decoder" in entry.maps.orders}
    shown = "impactx" if "impactx" in with_maps else next(iter(with_maps), None)
    return cell.model_copy(update={
        "verdicts": verdicts,
        "sentence": chosen.sentence if chosen else (
            "No finished model has learned from explanations."),
        "map_sentence": None if shown is None else map_sentence(shown, with_maps[shown])})


def _verdict(entry: ApproachEvidence, roles: Mapping[str, Role], alpha: float) -> Verdict:
    name, gains = entry.approach, entry.gains
    controls = [gain for over, gain in gains.items() if roles[over].kind in CONTROLS]
    remedy = ("approaches.single_stage0={kind: single_stage, lambdas: [0]}"
              if roles[name].at_once else "approach=[impactx,lambda0,shuffled]")
    numbers = _numbers(entry, roles)
    repeats = min((gain.repeats for gain in gains.values()), default=0)
    compared = {roles[over].kind for over in gains}
    absent = " and ".join(text for kind, text in REFERENCES.items() if kind not in compared)

    def sure(gain: Gain, sign: int, tries: int = 1) -> bool:
        return tries * gain.p_holm < alpha and sign * gain.mean > 0

    if not gains:
        return Verdict(verdict="cannot tell", sentence=(
            f"It cannot be told what {name} gains: the cell has no results of A or of a control."))
    if not controls:
        return Verdict(verdict="cannot tell", sentence=(
            "It cannot be told whether the explanations help, because no control was run "
            f"({remedy}). {name} gains {numbers}."))
    if repeats < REPEATS_FOR_A_CLAIM:
        few = "One repeat" if repeats == 1 else f"{repeats} repeats"
        return Verdict(verdict="cannot tell", sentence=(
            f"{few} cannot show whether the explanations help: run at least {REPEATS_FOR_A_CLAIM} "
            f"(repeats={REPEATS_FOR_A_CLAIM}). {name} gains {numbers}."))
    above_a = BASELINE in gains and sure(gains[BASELINE], 1)
    if any(sure(gain, -1, len(controls)) for gain in controls):
        return Verdict(verdict="hurt", sentence=(
            f"The explanations hurt: {name} gains {numbers}."))
    if not all(sure(gain, 1) for gain in controls):
        finding = ("is better than A, but not surely better than its controls" if above_a
                   else "is not surely better")
        return Verdict(verdict="do not help", sentence=(
            "The explanations do not help as far as can be told: "
            f"{name} {finding}. It gains {numbers}."))
    if BASELINE in gains and not above_a:
        return Verdict(verdict="do not help", sentence=(
            f"The explanations help {name} against its controls, but not beyond A: "
            f"it gains {numbers}."))
    if absent:
        return Verdict(verdict="cannot tell", sentence=(
            f"It cannot be told whether the explanations help, because {name} was not compared "
            f"with {absent} ({remedy}). {name} gains {numbers}."))
    return Verdict(verdict="help", sentence=f"The explanations help: {name} gains {numbers}.")


def _numbers(entry: ApproachEvidence, roles: Mapping[str, Role]) -> str:
    """Return the gains, and what a reader must know to interpret them."""
    own = roles[entry.approach]
    parts = [f"{_points(gain)} over {own.over(roles[over])}" for over, gain in entry.gains.items()]
    if any(gain.over == "images" for gain in entry.gains.values()):
        parts.append("with one repeat, the intervals leave out how much trainings differ")
    parts += [f"{entry.approach} was chosen from {own.candidates} candidates, {over} from "
              f"{candidates}, so the longer search is a part of the gain over it"
              for over in entry.gains
              if (candidates := roles[over].candidates) and candidates < (own.candidates or 0)]
    return "; ".join(parts)


def _points(gain: Gain) -> str:
    holm = " (Holm)" if gain.p_holm != gain.p else ""
    return (f"{100 * gain.mean:+.2f} points [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}], "
            f"p = {gain.p_holm:.2g}{holm}")
