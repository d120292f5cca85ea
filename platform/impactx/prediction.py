"""Use of a trained model on image files: which model, which pixels, what it says, and its map over the image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from impactx.api import Prediction, TrainedModel, load_model
from impactx.approaches.checkpoint import CheckpointError
from impactx.datasets.decoding import decode
from impactx.datasets.errors import DataError
from impactx.explain.maps.sheet import colour_limit, draw_sheet
from impactx.storage import Storage

log = logging.getLogger("impactx")
CHECKPOINT, RESULTS = "checkpoint.pt", "results.json"
TOP = 3  # classes that are printed


class PredictionError(RuntimeError):
    """No such model, or one that cannot be used; the message says what to give instead."""


@dataclass(frozen=True)
class ModelChoice:
    """Which model: an address, and which of a job's final models where it is a job's.

    address: a checkpoint file, its folder, a job's folder (or the output folder of one job), all local or s3://,
    or an address in MLflow (models:/..., runs:/...); cell: dataset/model, needed where the job has several;
    tracking: address of the MLflow server.
    """

    address: str
    cell: str | None = None
    approach: str | None = None
    repeat: int = 0
    tracking: str | None = None

    def load(self) -> TrainedModel:
        """The model, on the CPU. Raises PredictionError, TrackingError or StorageError."""
        try:
            if self.address.startswith(("models:/", "runs:/")):
                from impactx.tracking.checkpoints import fetch_checkpoint

                log.info("model: %s", self.address)
                return load_model(fetch_checkpoint(self.address, self.tracking))
            return self._from_storage()
        except CheckpointError as error:
            raise PredictionError(f"--model {self.address}: {error}") from error

    def _from_storage(self) -> TrainedModel:
        root, name = _split(self.address)
        if Storage(root).exists(name):
            return _read(Storage(root), name)
        here = Storage(self.address)
        if here.exists(CHECKPOINT):
            return _read(here, CHECKPOINT)
        if here.exists(RESULTS):
            return self._of_job(here)
        jobs = [job for job in here.folders("jobs") if here.exists(f"jobs/{job}/{RESULTS}")]
        if len(jobs) == 1:
            return self._of_job(Storage(here.uri(f"jobs/{jobs[0]}")))
        if jobs:
            raise PredictionError(f"--model {self.address} holds {len(jobs)} jobs: give one of\n"
                                  + "\n".join(f"  {here.uri(f'jobs/{job}')}" for job in jobs))
        raise PredictionError(f"--model {self.address}: no checkpoint file, no folder with a {CHECKPOINT} and no "
                              f"finished job's folder (jobs/<job> with a {RESULTS}) is there")

    def _of_job(self, job: Storage) -> TrainedModel:
        """A final model of a job, found beside it: the output folder may have been moved since."""
        rows = job.read_json(RESULTS)
        cells = sorted({f"{row['dataset']}/{row['model']}" for row in rows})
        if self.cell is None and len(cells) > 1:
            raise PredictionError(f"the job {job.root} has {len(cells)} cells: give --cell, one of {', '.join(cells)}")
        mine = [row for row in rows if self.cell in (None, f"{row['dataset']}/{row['model']}")]
        known = list(dict.fromkeys(row["approach"] for row in mine))
        approach = self.approach or ("impactx" if "impactx" in known else known[0] if known else "")
        found = [row for row in mine if row["approach"] == approach and row["repeat"] == self.repeat]
        if not found:
            raise PredictionError(
                f"the job {job.root} has no final model with --cell {self.cell or ', '.join(cells)}, --approach "
                f"{approach}, --repeat {self.repeat}; it has the cells {', '.join(cells)}, the approaches "
                f"{', '.join(known) or 'none of this cell'}, the repeats {sorted({row['repeat'] for row in mine})}")
        output = Storage(_split(_split(job.root)[0])[0])
        model = _read(output, f"models/{_split(found[0]['checkpoint'])[1]}/{CHECKPOINT}")
        # Checkpoints of before they kept lambda: the job knows which one was chosen.
        return model if model.weight is not None else replace(model, weight=found[0].get("weight"))


def _split(address: str) -> tuple[str, str]:
    """An address as (folder, name)."""
    folder, _, name = (address if "://" in address else str(Path(address).expanduser().absolute())).rstrip(
        "/").rpartition("/")
    return folder or "/", name


def _read(storage: Storage, path: str) -> TrainedModel:
    log.info("model: %s", storage.uri(path))
    return load_model(storage.read(path))


def read_images(files: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """Image files as uint8 (N, H, W, 3) of this size (height, width), converted as data sets' images are.

    What was changed of a file is logged. Raises DataError that names every file that cannot be read.
    """
    pixels, errors = [], []
    for file in files:
        try:
            image, kind, _, turned = decode(file)
        except DataError as error:
            errors.append(f"{file} {error}" if file.exists() else f"{file}: no such file")
            continue
        changes = ["turned as its EXIF orientation says"] if turned else []
        changes += [f"converted from {kind} to RGB"] if kind else []
        if image.shape[:2] != size:
            height, width = image.shape[:2]
            kept = "" if height * size[1] == width * size[0] else ", its proportions are changed"
            changes.append(f"resized from {width}x{height} to {size[1]}x{size[0]} pixels{kept}")
            image = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        if changes:
            log.info("%s: %s", file, "; ".join(changes))
        pixels.append(image)
    if errors:
        raise DataError("these images cannot be used:\n" + "\n".join(f"  - {error}" for error in errors))
    return np.stack(pixels)


def predict_files(files: Sequence[Path], choice: ModelChoice, folder: Path, *, device: str = "cpu") -> str:
    """Classify image files and draw each map over its image into `folder`; returns what is to be printed.

    The colours mean the same in every picture of one call. A map that is none, of a decoder that learned nothing, is
    not drawn, and it is said. Raises DataError, PredictionError, SheetError,
    TrackingError, StorageError.
    """
    model = choice.load()
    images = read_images(files, model.image_size)
    found = model.predict(images, device=device)
    pictures = [] if found.maps is None else _draw(files, images, model, found, folder)
    lines = []
    for i, file in enumerate(files):
        order = np.argsort(-found.probabilities[i], kind="stable")[:TOP]
        ranked = ", ".join(f"{model.class_names[k]} {found.probabilities[i, k]:.3f}" for k in order)
        lines.append(f"{file}: {ranked}" + (f"  -> {pictures[i]}" if pictures else ""))
    if found.maps is None and model.weight == 0:
        lines.append("no picture: this model was trained with lambda = 0, so its decoder learned no maps and what it "
                     "makes is noise; a model of the approach impactx with another lambda gives maps")
    elif found.maps is None:
        lines.append("no picture: this model gives classes only; a model of the approach impactx gives maps as well")
    return "\n".join(lines)


def _draw(files: Sequence[Path], images: np.ndarray, model: TrainedModel, found: Prediction, folder: Path
          ) -> list[Path]:
    assert found.maps is not None and model.map_kind is not None
    folder.mkdir(parents=True, exist_ok=True)
    limit, written = colour_limit(found.maps), []
    for i, file in enumerate(files):
        path = folder / f"{file.stem}-map.png"
        if path in written:
            path = folder / f"{file.stem}-map-{i}.png"
        label = int(found.labels[i])
        draw_sheet(path, images[i:i + 1], found.maps[i:i + 1],
                   [f"{model.class_names[label]} {found.probabilities[i, label]:.2f}"], limit=limit,
                   title=file.name, kind=model.map_kind)
        written.append(path)
    return written
