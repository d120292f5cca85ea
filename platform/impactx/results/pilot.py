"""How many repeats a job needs, proposed from the spread of a few. It tells no gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from scipy import special

from impactx.evaluation.power import MOST_REPEATS, POWER, repeats_for
from impactx.results.evidence import evidence, roles
from impactx.results.evidence_records import Gain
from impactx.results.rows import Row
from impactx.results.verdicts import claim_of
from impactx.settings import ExperimentSettings
from impactx.storage import Storage


def proposal(storage: Storage, rows: Sequence[Row], settings: ExperimentSettings) -> str:
    """Return how many repeats the job needs, in words.

    Args:
        storage: The job's output.
        rows: Of the pilot's final models.
        settings: The experiment's.
    """
    shown, part_of = evidence(storage, rows, settings), roles(settings)
    claims = [(cell, entry, claim_of(entry, part_of)) for cell in shown.cells
              for entry in cell.approaches if entry.approach in cell.verdicts]
    gains = [gain for _, _, claim in claims if claim.testable for gain in claim.controls]
    if not gains:
        return ("The pilot cannot propose a number of repeats: no approach that learns from "
                "explanations has finished beside a control in at least 2 repeats.")
    spreads = "; ".join(
        f"{cell.dataset} x {cell.model}, {entry.approach} over {over}: "
        f"{100 * (gain.spread or 0):.2f} points"
        for cell, entry, _ in claims for over, gain in entry.gains.items())
    level = 1 - shown.confidence
    margin, tests = f"{shown.margin:g} points", sum(claim.testable for *_, claim in claims)

    def needed(wider: bool) -> int | None:
        numbers = [repeats_for(_at_upper_limit(gain) if wider else gain, shown.margin / 100,
                               level / tests, level) for gain in gains]
        return None if None in numbers else max(number or 0 for number in numbers)

    said = f"Standard deviations of the gains over {settings.repeats} repeats: {spreads}. "
    number, upper = needed(False), needed(True)
    if number is None:
        return said + (f"Not even {MOST_REPEATS} repeats would show {margin} on these test images: "
                       "choose a larger margin (evaluation.margin).")
    most = "no number is enough" if upper is None else f"it is {upper + settings.repeats}"
    return said + (
        f"Run repeats={number + settings.repeats}: the pilot's {settings.repeats}, which are not "
        f"counted, and {number} that show a difference of {margin} from each control, or that none "
        f"is larger, with {100 * POWER:g} % power. {settings.repeats} repeats know a spread only "
        f"roughly: at the upper end of it (80 % confidence) {most}.")


def _at_upper_limit(gain: Gain) -> Gain:
    """Return the gain with the spread that the true one exceeds with a chance of 20 %."""
    degrees = gain.repeats - 1
    factor = math.sqrt(degrees / float(special.chdtri(degrees, 0.8)))
    return replace(gain, error_of_repeats=factor * gain.error_of_repeats)
