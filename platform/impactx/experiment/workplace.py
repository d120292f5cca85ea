"""Where units are worked on: the output, the data sets, the checkpoints of others.

Every process of a job gets one, those too that only hand on: what is heavy is imported where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impactx.datasets import Dataset, load_dataset
from impactx.experiment.units import CHECKPOINT, Artifacts, WorkError
from impactx.settings import DatasetSettings
from impactx.storage import Storage

if TYPE_CHECKING:
    import numpy as np

    from impactx.explain.store import MapStore


@dataclass(frozen=True)
class Workplace:
    """Where units are worked on; travels to every process.

    output: root of the artifacts; cache: local folder of decoded images and unpacked maps, or None for
    the data set's default; threads: of torch in this process; memory_bytes: for batches of masks;
    storage_patience: seconds for which a full or absent storage is waited for.
    """

    output: str
    data_root: str
    cache: str | None
    threads: int = 1
    memory_bytes: int = 2**29
    storage_patience: float = 0

    @property
    def artifacts(self) -> Artifacts:
        """The artifacts under the output's root."""
        return Artifacts(Storage(self.output, self.storage_patience))

    def dataset(self, settings: dict[str, Any]) -> Dataset:
        """The data set, decoded once a node, opened once a process."""
        return _open_dataset(DatasetSettings.model_validate(settings), self.data_root, self.cache)

    def checkpoint(self, folder: str, weights: str) -> Any:
        """The model that another unit left in its folder (see approaches.checkpoint), with these weights.

        Raises WorkError, naming the file, where it is absent, damaged or of another model.
        """
        from impactx.approaches.checkpoint import CheckpointError, load_checkpoint
        from impactx.models import weights_fingerprint

        where = self.artifacts.storage.uri(f"{folder}/{CHECKPOINT}")
        remedy = f"delete the folder {self.artifacts.storage.uri(folder)}, the model is then trained anew"
        try:
            loaded = load_checkpoint(self.artifacts.storage.read(f"{folder}/{CHECKPOINT}"))
        except FileNotFoundError:
            raise WorkError(f"the checkpoint {where} is missing: {remedy}") from None
        except CheckpointError as error:
            raise WorkError(f"the checkpoint {where} cannot be used: {error}: {remedy}") from error
        if (found := weights_fingerprint(loaded.model)) != weights:
            raise WorkError(f"the checkpoint {where} is of another model: its weights are {found}, "
                            f"the plan's {weights}: {remedy}")
        return loaded

    def map_array(self, store: MapStore, data: Dataset) -> np.ndarray:
        """The maps of a complete store, memory-mapped; unpacked once a node, beside the decoded images."""
        return store.unpack(Path(data.folder).parent / "maps")


@lru_cache(maxsize=4)
def _open_dataset(settings: DatasetSettings, data_root: str, cache: str | None) -> Dataset:
    return load_dataset(settings, data_root, cache)
