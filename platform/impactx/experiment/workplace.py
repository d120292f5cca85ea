"""Where steps are done: the output, the data sets, the models that other steps left.

Every process of a job gets one, those included that only hand it on, so what is heavy is imported
where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from impactx.datasets import Dataset, load_dataset
from impactx.experiment.artifacts import CHECKPOINT, Artifacts
from impactx.experiment.steps.base import StepError
from impactx.settings import DatasetSettings
from impactx.storage import Storage

if TYPE_CHECKING:
    import numpy as np

    from impactx.approaches.checkpoint import Loaded
    from impactx.explain.maps.store import MapStore


@dataclass(frozen=True)
class Workplace:
    """Where steps are done; it travels to every process.

    Attributes:
        output: Root of the artifacts.
        data_root: Folder or s3:// address of the data sets.
        cache: Local folder of decoded images and unpacked maps; None for the data set's default.
        threads: Of torch, in each process.
        memory_bytes: Working memory for batches of masked images.
        storage_patience: Seconds for which a full or absent storage is waited for.
        cache_bytes: That the cache may hold; None: it grows.
        session: Names this start of the job, in whose course each node checks the contents of its
            cache once.
    """

    output: str
    data_root: str
    cache: str | None
    threads: int = 1
    memory_bytes: int = 2**29
    storage_patience: float = 0
    cache_bytes: int | None = None
    session: str = ""

    @property
    def artifacts(self) -> Artifacts:
        """The artifacts under the output's root."""
        return Artifacts(Storage(self.output, self.storage_patience))

    def dataset(self, settings: DatasetSettings, data: str = "", test: str = "") -> Dataset:
        """Return a data set, decoded once a node and opened once a process.

        Args:
            settings: Of the data set.
            data: The fingerprint that its contents must have; "" where it is not known yet.
            test: The same of its test part; "" where that is not used.

        Raises:
            StepError: The data on this node are others.
        """
        opened = _open_dataset(settings, self)
        for part, present, planned in (("data set", opened.fingerprint, data),
                                       ("test part of", opened.test_fingerprint, test)):
            if planned and present != planned:
                raise StepError(
                    f"the {part} {opened.name!r} on this node has fingerprint {present}, the "
                    f"plan's is {planned}: give every node the same files")
        return opened

    def checkpoint(self, folder: str, weights: str) -> Loaded:
        """Return the model that a step left in its folder.

        Args:
            folder: Of the step that trained it, under the output's root.
            weights: The fingerprint that its weights must have.

        Raises:
            StepError: The checkpoint is absent, damaged or another model's; the message names it.
        """
        from impactx.approaches.checkpoint import CheckpointError, load_checkpoint
        from impactx.models import weights_fingerprint

        storage = self.artifacts.storage
        file = storage.uri(f"{folder}/{CHECKPOINT}")
        remedy = f"delete the folder {storage.uri(folder)}, the model is then trained anew"
        try:
            loaded = load_checkpoint(storage.read(f"{folder}/{CHECKPOINT}"))
        except FileNotFoundError:
            raise StepError(f"the checkpoint {file} is missing: {remedy}") from None
        except CheckpointError as error:
            raise StepError(f"the checkpoint {file} cannot be used: {error}: {remedy}") from error
        if (present := weights_fingerprint(loaded.model)) != weights:
            raise StepError(f"the checkpoint {file} is of another model: its weights are "
                            f"{present}, those of the plan {weights}: {remedy}")
        return loaded

    def map_array(self, store: MapStore, data: Dataset) -> np.ndarray:
        """Return the maps of a complete store as a memory-mapped array, unpacked once a node."""
        return store.unpack(Path(data.folder).parent, limit=self.cache_bytes, session=self.session)


@lru_cache(maxsize=4)
def _open_dataset(settings: DatasetSettings, place: Workplace) -> Dataset:
    return load_dataset(settings, place.data_root, place.cache, limit=place.cache_bytes,
                        session=place.session)
