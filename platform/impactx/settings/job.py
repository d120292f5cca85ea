"""Settings of whole jobs: how models are judged, where the work is done, what is tracked, what it is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from impactx.settings.base import Fraction, Settings, unique
from impactx.settings.cell import DatasetSettings, GridSettings, ModelSettings, TrainingSettings
from impactx.settings.extensions import (
    AnyApproach,
    AnyAttribution,
    AnyMapMetric,
    AttributionSettings,
    MapMetricSettings,
    attribution,
    map_metric,
)
from impactx.settings.maps import MapSettings


def _partition() -> AttributionSettings:
    """The default attribution. Only here, and not at the top: its class imports torch."""
    return attribution.parse({"method": "partition"})


MapOrder = Literal["own", "predicted", "true", "of_a", "mean_map"]


def _metrics_by_name(metrics: Any) -> Any:
    """Let a bare name stand for the metric with its defaults."""
    return [{"metric": one} if isinstance(one, str) else one for one in metrics] if isinstance(metrics, list) else metrics


def _no_metric_twice(metrics: list[MapMetricSettings]) -> list[MapMetricSettings]:
    unique([one.metric for one in metrics])
    return metrics


def _default_metrics() -> list[Any]:
    return [map_metric.parse({"metric": name}) for name in ("morf", "fidelity")]


class EvaluationSettings(Settings):
    """How finished models and their maps are judged (docs/METHOD.md). Ours; the paper shows single images."""

    resamples: int = Field(10_000, ge=100, le=1_000_000, description="of the bootstrap that gives intervals")
    confidence: Fraction = Field(0.95, description="of the intervals; 1 - confidence is the level of the tests")
    map_images: int = Field(1000, ge=0, description=(
        "test images on which each final model's maps are judged, drawn stratified, the same for every "
        "model of a data set; more than there are: all; 0: none"))
    seed: int = Field(0, ge=0, lt=2**31, description="of that draw, of the noise, of random orders and of resamples")
    metrics: Annotated[list[AnyMapMetric], BeforeValidator(_metrics_by_name), AfterValidator(_no_metric_twice)] = Field(
        default_factory=_default_metrics, min_length=1, description=(
            "by what maps are judged, each a metric with its settings; a bare name stands for the metric's defaults: "
            "`evaluation.metrics=[{metric: morf, region: 8}, fidelity]`"))
    orders: Annotated[list[MapOrder], AfterValidator(unique)] = Field(
        ["own", "predicted", "true", "of_a", "mean_map"], description=(
            "maps that are judged, as far as a model has them: own: what the model itself makes in its forward pass; "
            "predicted, true: of `attribution` for the model's own predicted or the true class; of_a: of the A that it "
            "was trained on, for the true class (what the decoder learns); mean_map: the mean training map for every "
            "image. Random order and the first map's least-relevant-first are always drawn beside"))
    attributions: list[AnyAttribution] = Field([], description=(
        "further attributions whose maps for the predicted class are judged"))
    approaches: list[str] | None = Field(None, description="whose models' maps are judged; None: all, A's as well")

    @model_validator(mode="before")
    @classmethod
    def _region_is_morfs(cls, values: Any) -> Any:
        if isinstance(values, dict) and "region" in values:
            raise ValueError(f"evaluation.region is a setting of the metric morf: write "
                             f"evaluation.metrics=[{{metric: morf, region: {values['region']}}}, fidelity]")
        return values


class ClusterSettings(Settings):
    """Where and with what the work is done: never part of a fingerprint."""

    address: str | None = Field(None, description=(
        "of a running Ray cluster; None: RAY_ADDRESS, or a local one that lives as long as the job"))
    num_cpus: int | None = Field(None, ge=1, description="of a local cluster; None: all")
    trial_cpus: float = Field(1, gt=0, description="of one worker of a trial")
    trial_gpus: float = Field(0, ge=0, le=1, description=(
        "of one worker of a trial; 0: CPUs only; several share a GPU at a fraction, which is of one GPU (0.4: two on "
        "each); for several GPUs raise trial_workers"))
    trial_workers: int = Field(1, ge=1, description=(
        "data-parallel workers of one trial, each with trial_cpus and trial_gpus; more than 1: by Ray Train"))
    max_concurrent_trials: int | None = Field(None, ge=1, description="of all cells together; None: what fits")
    cells_at_once: int | None = Field(None, ge=1, description=(
        "cells under way at once, which share the cluster; 1: one cell after the other; None: as many as trials that "
        "fit at once when the job begins and max_concurrent_trials allows, at least 3"))
    grows_to_cpus: int | None = Field(None, ge=1, description=(
        "of a cluster that starts nodes on demand: how many CPUs it may come to, so that as much work (trials, "
        "trainings, actors of maps) is asked for; None: it stays as it is"))
    grows_to_gpus: int | None = Field(None, ge=1, description="the same for GPUs")
    train_workers: int = Field(1, ge=1, description="data-parallel workers of a final training (Ray Train)")
    train_cpus: float = Field(1, gt=0, description="CPUs of one such worker")
    use_gpu: bool = Field(False, description="final trainings on GPUs")
    explain_cpu_actors: int | None = Field(None, ge=0, description=(
        "None: one a CPU of the cluster, or of what it may come to"))
    explain_gpu_actors: int | None = Field(None, ge=0, description=(
        "None: one a GPU of the cluster, or of what it may come to"))
    explain_memory_mb: int = Field(512, ge=64, description="working memory of one actor's mask batches")
    threads: int = Field(1, ge=1, description="of torch in each process; results on a CPU may depend on it")
    max_failures: int = Field(3, ge=0, description="of one trial or training before it counts as failed")
    storage_patience: float = Field(600, ge=0, allow_inf_nan=False, description=(
        "seconds for which a process waits where the output is full or does not answer; then its work fails"))


class TrackingSettings(Settings):
    """MLflow. The address may hold a password: give it by MLFLOW_TRACKING_URI, not here."""

    enabled: bool = True
    uri: str | None = Field(None, description="None: MLFLOW_TRACKING_URI, else sqlite in the output folder")
    ui: str | None = Field(None, description=(
        "address at which people open the server's pages, where it is not the one that jobs use; None: that one"))
    experiment: str = Field("impactx", min_length=1)


def _names_agree(group: dict[str, Any]) -> dict[str, Any]:
    for key, value in group.items():
        if key != value.name:
            raise ValueError(f"the entry {key!r} has the name {value.name!r}: they must be equal")
    return group


class ExplainSettings(Settings):
    """One job that explains a model of the user's: on which images, how, and where the maps go."""

    output: str = Field("results", min_length=1, description="local folder or s3:// address of the store of maps")
    data_root: str = Field("data", min_length=1, description=(
        "folder of the data sets; or an s3:// address, whose files every node fetches once into its cache"))
    cache: str | None = Field(None, description="local folder of decoded images and unpacked maps, on every node")
    datasets: Annotated[dict[str, DatasetSettings], AfterValidator(_names_agree)]
    plugins: list[str] = Field([], description=(
        "Python files of your own that register attributions, approaches, data sources or metrics of maps, relative to "
        "the working directory (docs/extending.md)"))
    attribution: AnyAttribution = Field(default_factory=_partition)
    maps: MapSettings = MapSettings()
    cluster: ClusterSettings = ClusterSettings()

    @field_validator("datasets")
    @classmethod
    def _one_data_set(cls, datasets: dict[str, DatasetSettings]) -> dict[str, DatasetSettings]:
        if len(datasets) != 1:
            raise ValueError(f"{len(datasets)} data sets ({', '.join(datasets)}): choose the one whose training images "
                             "are explained, dataset=<name>")
        return datasets

    @property
    def dataset(self) -> DatasetSettings:
        """The data set."""
        return next(iter(self.datasets.values()))


class ExperimentSettings(Settings):
    """One job: cells (data set x model), each with stage 1, maps, stage 2 and the final test."""

    name: str = Field("full_grid", min_length=1, pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**31)
    repeats: int = Field(5, ge=1, description="trainings of the selected configuration, each with its own seed")
    output: str = Field("results", min_length=1, description="local folder or s3:// address of all artifacts")
    data_root: str = Field("data", min_length=1, description=(
        "folder of the data sets; or an s3:// address, whose files every node fetches once into its cache"))
    cache: str | None = Field(None, description=(
        "local folder of decoded images and unpacked maps, on every node; None: data_root/.cache, or the user's "
        "cache folder where that cannot be written"))
    plugins: list[str] = Field([], description=(
        "Python files of your own that register attributions, approaches, data sources or metrics of maps, relative to "
        "the working directory (docs/extending.md)"))
    reuse: Literal["same_code", "any_code"] = Field("same_code", description=(
        "which finished steps are not done again. same_code: those that today's code did; any_code: also those of the "
        "same settings and inputs that other code did, which the job, its table and its report then say"))
    datasets: Annotated[dict[str, DatasetSettings], AfterValidator(_names_agree)] = Field(min_length=1)
    models: Annotated[dict[str, ModelSettings], AfterValidator(_names_agree)] = Field(min_length=1)
    grid: GridSettings = GridSettings()
    training: TrainingSettings = TrainingSettings()
    attribution: AnyAttribution = Field(default_factory=_partition)
    maps: MapSettings = MapSettings()
    approaches: dict[str, AnyApproach] = Field(default_factory=dict)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("datasets")
    @classmethod
    def _datasets_have_tests(cls, datasets: dict[str, DatasetSettings]) -> dict[str, DatasetSettings]:
        without = [name for name, dataset in datasets.items() if dataset.test_fraction is None]
        if without:
            raise ValueError(f"test_fraction null of {', '.join(without)}: an experiment ends with a test; give a "
                             "share above 0 and below 1")
        return datasets

    @model_validator(mode="after")
    def _asha_stops_one_worker(self) -> ExperimentSettings:
        if self.grid.strategy == "asha" and self.cluster.trial_workers > 1:
            raise ValueError(f"grid.strategy 'asha' with cluster.trial_workers = {self.cluster.trial_workers}: a trial "
                             "over several workers cannot be stopped early; set trial_workers to 1")
        return self

    @field_validator("approaches")
    @classmethod
    def _baseline_is_a(cls, approaches: dict[str, Any]) -> dict[str, Any]:
        if "baseline" in approaches or any(a.kind == "baseline" for a in approaches.values()):
            raise ValueError("'baseline' is A itself and always trained: choose another name for the approach")
        return approaches

    @model_validator(mode="after")
    def _judged_approaches_exist(self) -> ExperimentSettings:
        unknown = [name for name in self.evaluation.approaches or [] if name not in ("baseline", *self.approaches)]
        if unknown:
            raise ValueError(f"evaluation.approaches = {unknown}: no such approach in this experiment; there are "
                             f"{', '.join(('baseline', *self.approaches))}")
        return self
