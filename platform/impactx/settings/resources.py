"""What the processes of a model ask a cluster for: CPUs, a GPU or a share of one, workers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from impactx.settings.base import Settings

Device = Literal["auto", "cpu", "logical"]
SMALLEST_SHARE = 0.01  # a hundred processes on one card


class ProcessResources(Settings):
    """What one process holds."""

    cpus: float = Field(1, gt=0, allow_inf_nan=False, description="The CPUs of one process.")
    gpus: float = Field(1, ge=0, le=1, description=(
        "The GPU, or the share of one, of each process where the cluster has GPUs. 0: it stays on "
        "CPUs; 0.4: two processes share each GPU. For several GPUs in one training raise workers."))

    @field_validator("gpus", mode="before")
    @classmethod
    def _fits_a_card(cls, gpus: Any) -> Any:
        if isinstance(gpus, (int, float)) and gpus and not SMALLEST_SHARE <= gpus <= 1:
            raise ValueError(
                f"{gpus:g} of a GPU fits no card: allowed are 0 (CPUs only) and {SMALLEST_SHARE} "
                "to 1, the share of one card that a process has. A training gets several cards by "
                "workers, each of which has one")
        return gpus


class TrainingResources(ProcessResources):
    """What a training holds: data-parallel workers, each with so much."""

    workers: int = Field(1, ge=1, description=(
        "Data-parallel workers of one training, each with these cpus and gpus (Ray Train). The "
        "results of several equal those of one but for rounding."))

    @model_validator(mode="after")
    def _a_card_a_worker(self) -> Self:
        if self.workers > 1 and 0 < self.gpus <= 0.5:
            raise ValueError(
                f"workers = {self.workers} with gpus = {self.gpus:g}: two of them may come onto "
                "one card, over which NCCL exchanges no gradients; set gpus to 1, or workers to 1")
        return self


class MapsResources(ProcessResources):
    """What an actor that makes maps holds."""

    workers: int | None = Field(None, ge=1, description=(
        "At most so many actors make the maps of a model; null: as many as there is room for. "
        "Where they are on GPUs, actors on CPUs join them if that shortens the end, unless a "
        "number is given."))


class ModelResources(Settings):
    """What each kind of process of a model asks the cluster for. No result depends on it.

    A test, and the judgement of a model's maps, hold what one worker of a trial does.
    """

    trial: TrainingResources = TrainingResources()
    training: TrainingResources = TrainingResources()
    maps: MapsResources = MapsResources()

    def on_cpus(self) -> ModelResources:
        """Return the same without GPUs."""
        none = {"gpus": 0.0}
        return ModelResources(trial=self.trial.model_copy(update=none),
                              training=self.training.model_copy(update=none),
                              maps=self.maps.model_copy(update=none))
