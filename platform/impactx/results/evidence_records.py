"""What finished rows show, as typed records; `impactx.results.evidence` fills them.

Accuracies and gains are fractions in [0, 1]. An `Estimate` (see `evaluation.statistics`) is a mean
over repeats and test images with its interval. jobs/<job>/evidence.json holds the same
as plain data: each record is a mapping from the names of its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from impactx.approaches.role import RoleKind
from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.pooling import CommonEffect
from impactx.evaluation.statistics import Estimate

VerdictKind = Literal["helps", "hurts", "no difference", "cannot be told"]


@dataclass(frozen=True)
class Gain(Estimate):
    """A paired difference of accuracy between two approaches; its p is not corrected."""

    p: float


@dataclass(frozen=True)
class MapValue(Estimate):
    """A value of a metric of maps.

    Attributes:
        decoder_over: The decoder's value minus this one, paired; None for the decoder itself, and
            where there is no decoder.
    """

    decoder_over: Estimate | None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Summary(_Record):
    """A value over repeats.

    Attributes:
        mean: The mean.
        spread: The sample standard deviation; None for one repeat.
    """

    mean: float
    spread: float | None


class OrderAreas(_Record):
    """Areas over the MoRF curve (AOPC) of one order of regions.

    The differences are of `aopc`, paired, and their p is not corrected. One is None for the order
    itself, and where the other order does not exist.

    Attributes:
        aopc: Of the predicted class's probability, over the first 16 % of the regions.
        over_random: aopc minus that of a random order.
        over_explainer: aopc minus that of `MapEvidence.explainer`.
        over_mean_map: aopc minus that of the mean training map.
        all_regions: Of the probability, over all regions.
        logit: Of the class's score before the softmax, over the first 16 % of the regions.
        logit_all_regions: Of the score, over all regions.
    """

    aopc: Estimate
    over_random: Estimate | None
    over_explainer: Estimate | None
    over_mean_map: Estimate | None
    all_regions: Estimate
    logit: Estimate
    logit_all_regions: Estimate


Values = dict[str, dict[str, MapValue]]
"""Values of a metric by order (or predictor) of the maps, then by the value's name."""


class MapEvidence(_Record):
    """What an approach's maps are worth, over repeats and test images together.

    Attributes:
        orders: MoRF by order; empty where it was not measured.
        explainer: The order of an attribution's maps of the model itself for the predicted class,
            SHAP's if there is one; None where there is none.
        fidelity: By predictor: "mse", "correlation" and "overlap"; empty without a decoder.
        metrics: By metric, of all others whose values of each image were kept.
    """

    orders: dict[str, OrderAreas]
    explainer: str | None
    fidelity: Values
    metrics: dict[str, Values]


class ApproachEvidence(_Record):
    """One approach in a cell.

    Attributes:
        approach: Its name.
        role, candidates: Its part in the comparison, and the size of its own search; see
            `approaches.role.Role`.
        weight: Lambda; None where the approach has none.
        repeats: The numbers of its repeats, in order.
        seconds: Mean training time of one repeat.
        paper: The paper's accuracy, where it may stand beside ours.
        seconds_in_all: Mean process seconds of one model, its A and its maps included; None where
            they are not known for every repeat.
        map_seconds: Mean seconds that a prediction needs for a map of its image; None where it
            needs none.
        checkpoints: Addresses of the models' folders, one for each of `repeats`.
        accuracy: On the test set.
        val_accuracy: On the validation part.
        ece: Expected calibration error (15 bins).
        nll: Negative log likelihood in nats.
        per_class: Mean accuracy of each class, in the order of the labels; None where a class has
            no test image.
        gains: By the name of the reference: A, the same network with lambda = 0, shuffled maps; for
            a single stage also the same approach in two stages.
        map_quality: The judgement of each repeat's maps; None where there is none.
        maps: The maps of all repeats together; None where no repeat's maps were judged.
    """

    approach: str
    role: RoleKind
    candidates: int | None
    weight: float | None
    repeats: list[int]
    seconds: float
    paper: float | None
    seconds_in_all: float | None
    map_seconds: float | None
    checkpoints: list[str]
    accuracy: Estimate
    val_accuracy: Summary
    ece: Summary
    nll: Summary
    per_class: list[float | None]
    gains: dict[str, Gain]
    map_quality: list[MapQuality | None]
    maps: MapEvidence | None


class Verdict(_Record):
    """Whether the explanations help an approach, with the sentence that says so.

    Attributes:
        verdict: "no difference" means none larger than `Evidence.margin`.
        sentence: With the gains, and what a reader must know to interpret them.
        p_helps: The level at which all gains are above 0; None where it cannot be tested.
        p_hurts: The level at which a gain over a control is below 0, corrected over the controls;
            None where it cannot be tested.
        p_helps_holm, p_hurts_holm: The same, corrected by Holm's procedure over all verdicts of the
            job (cells and approaches); None where there is one verdict, and nothing to correct.
        detectable: The smallest true difference from any of its controls that these repeats would
            have shown with 80 % power, as a fraction; None for one repeat.
        repeats_for_margin: How many repeats would settle a difference of the margin from each
            control, with 80 % power; None for one repeat, and where no number would.
    """

    verdict: VerdictKind
    sentence: str
    p_helps: float | None = None
    p_hurts: float | None = None
    p_helps_holm: float | None = None
    p_hurts_holm: float | None = None
    detectable: float | None = None
    repeats_for_margin: int | None = None


class CellEvidence(_Record):
    """One data set with one model.

    Attributes:
        dataset, model: Their names.
        test_images: The number of test images; 0 where no predictions could be read.
        approaches: In the order of the rows. An approach none of whose predictions can be read is
            left out and named in `missing`.
        missing: Sentences on what could not be read.
        verdicts: By approach that learns its own explanations (with lambda above 0).
        sentence: The verdict on "impactx", or on the first approach that has one, or why there is
            none.
        map_sentence: What the maps of the same approach are worth; None where they were not judged.
    """

    dataset: str
    model: str
    test_images: int = 0
    approaches: list[ApproachEvidence] = []
    missing: list[str] = []
    verdicts: dict[str, Verdict] = {}
    sentence: str = ""
    map_sentence: str | None = None


class Evidence(_Record):
    """What the finished rows of a job show.

    Attributes:
        confidence: Of the intervals, in (0, 1).
        margin: The difference that does not matter, in points.
        repeats: How many the job asked for, the pilot's included.
        pilot: How many of them, the first ones, were a pilot, which is left out here.
        cells: In the order of the rows.
        common: The gains over several cells, of every approach that has a verdict.
    """

    confidence: float
    margin: float
    repeats: int
    pilot: int = 0
    cells: list[CellEvidence]
    common: list[CommonEffect] = []

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `as_json` returned.

        Raises:
            pydantic.ValidationError: The data are of another shape.
        """
        return cls.model_validate(data)
