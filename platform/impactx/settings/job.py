"""Settings of whole jobs: what is done, how maps are judged, on which machines, with what log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from impactx.settings.base import Fraction, Name, Settings, unique
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
from impactx.settings.resources import Device, MapsResources, ProcessResources


def _partition() -> AttributionSettings:
    """Return the default attribution. It is not made at import: its class imports torch."""
    default: AttributionSettings = attribution.parse({"method": "partition"})
    return default


MapOrder = Literal["own", "predicted", "true", "of_a", "mean_map"]


def _metrics_by_name(metrics: Any) -> Any:
    """Let a bare name stand for the metric with its defaults."""
    if not isinstance(metrics, list):
        return metrics
    return [{"metric": one} if isinstance(one, str) else one for one in metrics]


def _no_metric_twice(metrics: list[MapMetricSettings]) -> list[MapMetricSettings]:
    unique([one.metric for one in metrics])
    return metrics


def _default_metrics() -> list[Any]:
    return [map_metric.parse({"metric": name}) for name in ("morf", "fidelity")]


if TYPE_CHECKING:  # mypy accepts no annotation that is made at run time
    MapMetrics = list[MapMetricSettings]
else:
    MapMetrics = Annotated[list[AnyMapMetric], BeforeValidator(_metrics_by_name),
                           AfterValidator(_no_metric_twice)]


class EvaluationSettings(Settings):
    """How accuracies are compared and maps are judged (docs/METHOD.md).

    All of it is ours: the paper gives single accuracies and shows single maps.
    """

    resamples: int = Field(10_000, ge=100, le=1_000_000, description=(
        "Resamples of the bootstrap from which the intervals of one model's map quality (MoRF "
        "curves) are computed."))
    confidence: Fraction = Field(0.95, description=(
        "The confidence of intervals; 1 - confidence is the level of tests."))
    margin: float = Field(0.5, gt=0, lt=100, description=(
        "The difference of accuracy, in points, below which a difference does not matter: "
        "explanations may be found to make no difference larger than this. Fix it before the "
        "results are seen."))
    map_images: int = Field(1000, ge=0, description=(
        "Test images on which the maps of each final model are judged. They are drawn stratified, "
        "and are the same for every model of a data set. If there are fewer, all are used; 0: "
        "maps are not judged."))
    seed: int = Field(0, ge=0, lt=2**31, description=(
        "The seed of that draw, of noise, of random orders of pixels and of resamples."))
    metrics: MapMetrics = Field(default_factory=_default_metrics, min_length=1, description=(
        "The metrics by which maps are judged, each with its settings. A bare name stands for the "
        "metric with its defaults: `evaluation.metrics=[{metric: morf, region: 8}, fidelity]`"))
    orders: Annotated[list[MapOrder], AfterValidator(unique)] = Field(
        ["own", "predicted", "true", "of_a", "mean_map"], description=(
            "The maps that are judged, as far as a model has them. own: those that the model makes "
            "in its forward pass; predicted, true: those that `attribution` computes of the model, "
            "for the predicted or for the true class; of_a: those that it computes of the "
            "classifier A on which the model was built, for the true class, which is what the "
            "decoder learns; mean_map: the mean training map, for every image. A random order and "
            "the reversed order of the first of these are always judged as well."))
    attributions: list[AnyAttribution] = Field([], description=(
        "Further attributions whose maps for the predicted class are judged."))
    approaches: list[str] | None = Field(None, description=(
        "The approaches whose maps are judged; null: all of them, and those of A (baseline)."))

    @model_validator(mode="before")
    @classmethod
    def _region_is_morfs(cls, values: Any) -> Any:
        if isinstance(values, dict) and "region" in values:
            raise ValueError(f"evaluation.region is a setting of the metric morf: write "
                             f"evaluation.metrics=[{{metric: morf, region: {values['region']}}}, "
                             "fidelity]")
        return values


class ClusterSettings(Settings):
    """The machines and processes that do the work. No result is identified by these settings."""

    address: str | None = Field(None, description=(
        "The address of a running Ray cluster; null: the one in RAY_ADDRESS, else a local cluster "
        "that lives as long as the job."))
    num_cpus: int | None = Field(None, ge=1, description=(
        "The CPUs of a local cluster; null: all of this machine."))
    device: Device = Field("auto", description=(
        "auto: where the cluster has GPUs, trainings, tests, maps and judgements are done on them, "
        "by the shares in models.<name>.resources; cpu: nothing is, whatever the cluster has; "
        "logical: as auto, but what Ray gives a GPU computes on its CPU, to rehearse on machines "
        "without GPUs (`ray start --num-gpus=…`) how a job would be placed."))
    max_concurrent_trials: int | None = Field(None, ge=1, description=(
        "Trials that run at the same time, of all cells together; null: as many as fit."))
    cells_at_once: int | None = Field(None, ge=1, description=(
        "Cells that are under way at the same time and share the cluster; 1: one cell after the "
        "other; null: as many as trials can run at the same time when the job begins, but at "
        "least 3."))
    grows_to_cpus: int | None = Field(None, ge=1, description=(
        "For a cluster that starts nodes on demand: the CPUs to which it may grow, so that as many "
        "trials, trainings and makers of maps are asked for; null: it keeps its size."))
    grows_to_gpus: int | None = Field(None, ge=1, description=(
        "For such a cluster: the GPUs to which it may grow."))
    explain_memory_mb: int = Field(512, ge=64, description=(
        "Megabytes of masked images that one process that makes maps holds at a time."))
    threads: int = Field(1, ge=1, description=(
        "Threads of torch in each process. Results on a CPU may depend on their number."))
    max_failures: int = Field(3, ge=0, description=(
        "How often a trial or a training starts again after its process died, before it counts as "
        "failed."))
    storage_patience: float = Field(600, ge=0, allow_inf_nan=False, description=(
        "Seconds for which a process waits while the output is full or does not answer; then its "
        "work fails."))


class TrackingSettings(Settings):
    """MLflow. An address with a password belongs into MLFLOW_TRACKING_URI, and not here."""

    enabled: bool = Field(True, description="Whether runs are logged to MLflow.")
    uri: str | None = Field(None, description=(
        "MLflow's address; null: the one in MLFLOW_TRACKING_URI, else a SQLite database in the "
        "output folder."))
    ui: str | None = Field(None, description=(
        "The address at which people open MLflow's pages, if it is not the one that jobs use; "
        "null: the same."))
    experiment: str = Field("impactx", min_length=1, description=(
        "The name of the experiment in MLflow to which runs are logged."))


def _names_agree(group: dict[str, Any]) -> dict[str, Any]:
    for key, value in group.items():
        if key != value.name:
            raise ValueError(
                f"the entry {key!r} has the name {value.name!r}: they must be equal")
    return group


DataRoot = Annotated[str, Field(min_length=1, description=(
    "The folder of the data sets; or an s3:// address, whose files every node fetches once into "
    "its cache."))]
Cache = Annotated[str | None, Field(description=(
    "The local folder of decoded images and unpacked maps, on every node; null: data_root/.cache, "
    "or the user's cache folder if that cannot be written."))]
CacheGb = Annotated[float | None, Field(gt=0, allow_inf_nan=False, description=(
    "The gibibytes of decoded images and unpacked maps that the cache may hold on a node. Beyond "
    "that, those that were not opened for longest are deleted, but none that a process has in use; "
    "what is needed again is made anew. null: nothing is deleted."))]
Plugins = Annotated[list[str], Field(description=(
    "Python files of your own that register attributions, approaches, data sources or metrics of "
    "maps, relative to the working directory (docs/extending.md)."))]
Datasets = Annotated[dict[str, DatasetSettings], AfterValidator(_names_agree)]
Models = Annotated[dict[str, ModelSettings], AfterValidator(_names_agree)]


class ExplainSettings(Settings):
    """A job that explains one model of the user's on the training images of one data set."""

    output: str = Field("results", min_length=1, description=(
        "The local folder or s3:// address of the store of maps."))
    data_root: DataRoot = "data"
    cache: Cache = None
    cache_gb: CacheGb = None
    datasets: Datasets
    plugins: Plugins = []
    attribution: AnyAttribution = Field(default_factory=_partition, description=(
        "The attribution that makes the maps."))
    maps: MapSettings = MapSettings()
    resources: MapsResources = MapsResources()
    cluster: ClusterSettings = ClusterSettings()

    def processes(self) -> dict[str, ProcessResources]:
        """Return what each kind of process asks the cluster for, by the setting that says so."""
        return {"resources": self.resources}

    @field_validator("datasets")
    @classmethod
    def _one_data_set(cls, datasets: dict[str, DatasetSettings]) -> dict[str, DatasetSettings]:
        if len(datasets) != 1:
            raise ValueError(f"{len(datasets)} data sets ({', '.join(datasets)}): choose the one "
                             "whose training images are explained, dataset=<name>")
        return datasets

    @property
    def dataset(self) -> DatasetSettings:
        """The data set."""
        return next(iter(self.datasets.values()))


class ExperimentSettings(Settings):
    """One job: its cells (a data set with a model), each with stage 1, maps, stage 2 and tests."""

    name: Name = Field("full_grid", description=(
        "The name of the job, with which its key begins."))
    seed: int = Field(0, ge=0, lt=2**31, description=(
        "The seed of repeat 0, and of all searches; repeat r has seed + r."))
    repeats: int = Field(5, ge=1, description=(
        "How often each selected configuration is trained, each time with its own seed."))
    output: str = Field("results", min_length=1, description=(
        "The local folder or s3:// address of everything that is kept."))
    data_root: DataRoot = "data"
    cache: Cache = None
    cache_gb: CacheGb = None
    plugins: Plugins = []
    reuse: Literal["same_code", "any_code"] = Field("same_code", description=(
        "Which finished steps are not computed again. same_code: those that the present code "
        "computed; any_code: also those with the same settings and inputs that other code "
        "computed, which the job, its table and its report then say."))
    datasets: Datasets = Field(min_length=1)
    models: Models = Field(min_length=1)
    grid: GridSettings = GridSettings()
    training: TrainingSettings = TrainingSettings()
    attribution: AnyAttribution = Field(default_factory=_partition, description=(
        "The attribution whose maps stage 2 learns, unless an approach has its own (paper 4.2: "
        "SHAP's partition explainer)."))
    maps: MapSettings = MapSettings()
    approaches: dict[Name, AnyApproach] = Field(default_factory=dict, description=(
        "The approaches that are compared with A, by names of yours."))
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    cluster: ClusterSettings = ClusterSettings()
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("datasets")
    @classmethod
    def _datasets_have_tests(cls, datasets: dict[str, DatasetSettings]
                             ) -> dict[str, DatasetSettings]:
        without = [name for name, dataset in datasets.items() if dataset.test_fraction is None]
        if without:
            raise ValueError(f"test_fraction null of {', '.join(without)}: an experiment ends with "
                             "a test; give a share above 0 and below 1")
        return datasets

    def processes(self) -> dict[str, ProcessResources]:
        """Return what each kind of process asks the cluster for, by the setting that says so."""
        return {f"models.{name}.resources.{kind}": getattr(model.resources, kind)
                for name, model in self.models.items() for kind in ("trial", "training", "maps")}

    @model_validator(mode="after")
    def _asha_stops_one_worker(self) -> ExperimentSettings:
        several = [name for name, model in self.models.items() if model.resources.trial.workers > 1]
        if self.grid.strategy == "asha" and several:
            raise ValueError(f"grid.strategy 'asha' with several workers of a trial of "
                             f"{', '.join(several)}: such a trial cannot be stopped early; set "
                             f"models.{several[0]}.resources.trial.workers to 1")
        return self

    @field_validator("approaches")
    @classmethod
    def _baseline_is_a(cls, approaches: dict[str, Any]) -> dict[str, Any]:
        if "baseline" in approaches or any(a.kind == "baseline" for a in approaches.values()):
            raise ValueError("'baseline' is A itself and always trained: choose another name for "
                             "the approach")
        return approaches

    @model_validator(mode="after")
    def _judged_approaches_exist(self) -> ExperimentSettings:
        names = ("baseline", *self.approaches)
        unknown = [name for name in self.evaluation.approaches or [] if name not in names]
        if unknown:
            raise ValueError(f"evaluation.approaches = {unknown}: no such approach in this "
                             f"experiment; there are {', '.join(names)}")
        return self
