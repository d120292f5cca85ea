"""The approaches that are compared with A: one class a kind, with what it plans and how it trains.

A new approach is a settings class in `impactx.settings` (and in its union), a module here with a subclass of
`Approach`, its entry below, and a file in configs/approach/.  Its network, if it has one of its own, goes into
`impactx.models`, with an entry among the kinds of checkpoints.
"""

from __future__ import annotations

from impactx.experiment.approaches.abn import AbnApproach
from impactx.experiment.approaches.base import Approach, Basis, Bench, Trained
from impactx.experiment.approaches.ensemble import EnsembleApproach
from impactx.experiment.approaches.impactx import ImpactxApproach
from impactx.experiment.approaches.single_stage import SingleStageApproach
from impactx.experiment.approaches.wae import WaeApproach
from impactx.settings import ApproachSettings, ExperimentSettings

__all__ = ["Approach", "Basis", "Bench", "Trained", "approach_of", "approaches_of"]

_KINDS: dict[str, type[Approach]] = {
    "impactx": ImpactxApproach, "abn": AbnApproach, "wae": WaeApproach, "ensemble": EnsembleApproach,
    "single_stage": SingleStageApproach}


def approach_of(name: str, settings: ApproachSettings) -> Approach:
    """The approach that an entry of the setting `approaches` names."""
    return _KINDS[settings.kind](name, settings)


def approaches_of(settings: ExperimentSettings) -> list[Approach]:
    """The approaches that an experiment compares with A, in its order."""
    return [approach_of(name, described) for name, described in settings.approaches.items()]
