"""Predictions for image files: finding the model, reading the images, drawing the model's maps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
TOP = 3  # number of classes that are printed for an image


class PredictionError(RuntimeError):
    """There is no such model, or it cannot be used; the message says what to give instead."""


@dataclass(frozen=True)
class ModelChoice:
    """The model that is used: an address, and if it is a job's, which of its final models.

    Attributes:
        address: A checkpoint file, its folder, a job's folder or the output folder of one job, each
            local or s3://; or an address in MLflow (models:/..., runs:/...).
        cell: "dataset/model" in a job; None if the job has only one cell.
        approach: The approach in a job; None for impactx, or the first one if there is none.
        repeat: The repeat in a job.
        tracking: The address of MLflow; None for the one of the environment.
    """

    address: str
    cell: str | None = None
    approach: str | None = None
    repeat: int = 0
    tracking: str | None = None

    def load(self) -> TrainedModel:
        """Return the model, on the CPU.

        Raises:
            PredictionError: There is no such model.
            TrackingError: MLflow does not have it, or does not answer.
            StorageError: The storage does not answer.
        """
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
        folder = Storage(self.address)
        if folder.exists(CHECKPOINT):
            return _read(folder, CHECKPOINT)
        if folder.exists(RESULTS):
            return self._of_job(folder)
        jobs = [job for job in folder.folders("jobs") if folder.exists(f"jobs/{job}/{RESULTS}")]
        if len(jobs) == 1:
            return self._of_job(Storage(folder.uri(f"jobs/{jobs[0]}")))
        if jobs:
            raise PredictionError(f"--model {self.address} holds {len(jobs)} jobs: give one of\n"
                                  + "\n".join(f"  {folder.uri(f'jobs/{job}')}" for job in jobs))
        raise PredictionError(
            f"--model {self.address}: no checkpoint file, no folder with a {CHECKPOINT} and no "
            f"finished job's folder (jobs/<job> with a {RESULTS}) is there")

    def _of_job(self, job: Storage) -> TrainedModel:
        """Return a final model of a job.

        It is looked for beside the job and not at its recorded address, since the output folder may
        have been moved.
        """
        rows = job.read_json(RESULTS)
        cells = sorted({_cell(row) for row in rows})
        if self.cell is None and len(cells) > 1:
            raise PredictionError(f"the job {job.root} has {len(cells)} cells: give --cell, one of "
                                  f"{', '.join(cells)}")
        rows = [row for row in rows if self.cell in (None, _cell(row))]
        approaches = list(dict.fromkeys(row["approach"] for row in rows))
        default = "impactx" if "impactx" in approaches else next(iter(approaches), "")
        approach = self.approach or default
        chosen = next((row for row in rows
                       if row["approach"] == approach and row["repeat"] == self.repeat), None)
        if chosen is None:
            raise PredictionError(
                f"the job {job.root} has no final model with --cell "
                f"{self.cell or ', '.join(cells)}, --approach {approach}, --repeat {self.repeat}; "
                f"it has the cells {', '.join(cells)}, the approaches "
                f"{', '.join(approaches) or 'none of this cell'}, the repeats "
                f"{sorted({row['repeat'] for row in rows})}")
        output = Storage(_split(_split(job.root)[0])[0])
        model = _read(output, f"models/{_split(chosen['checkpoint'])[1]}/{CHECKPOINT}")
        # Older checkpoints do not hold lambda; the job's table does.
        return model if model.weight is not None else replace(model, weight=chosen.get("weight"))


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['dataset']}/{row['model']}"


def _split(address: str) -> tuple[str, str]:
    """Return the folder of an address and its last part."""
    whole = address if "://" in address else str(Path(address).expanduser().absolute())
    folder, _, name = whole.rstrip("/").rpartition("/")
    return folder or "/", name


def _read(storage: Storage, path: str) -> TrainedModel:
    log.info("model: %s", storage.uri(path))
    return load_model(storage.read(path))


def read_images(files: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """Read image files and convert them as the images of data sets are converted.

    The changes of each file are logged.

    Args:
        files: N files.
        size: (height, width) in pixels, to which images are resized.

    Returns:
        uint8 (N, H, W, 3).

    Raises:
        DataError: Files cannot be read; the message names each of them.
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
            same_shape = height * size[1] == width * size[0]
            changes.append(f"resized from {width}x{height} to {size[1]}x{size[0]} pixels"
                           + ("" if same_shape else ", its proportions are changed"))
            image = np.asarray(
                Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        if changes:
            log.info("%s: %s", file, "; ".join(changes))
        pixels.append(image)
    if errors:
        listed = "\n".join(f"  - {error}" for error in errors)
        raise DataError(f"these images cannot be used:\n{listed}")
    return np.stack(pixels)


def predict_files(files: Sequence[Path], choice: ModelChoice, folder: Path, *,
                  device: str = "cpu") -> str:
    """Classify image files and draw the model's maps over them.

    All pictures of a call have one colour scale. The maps of a decoder that learned nothing are not
    drawn.

    Args:
        files: Image files.
        choice: The model.
        folder: The folder of the pictures, which is created.
        device: Where the model runs, as torch names it.

    Returns:
        A line for each file with its most probable classes and its picture, and the reason if there
        are no pictures.

    Raises:
        DataError: A file is no image.
        PredictionError: There is no such model.
        SheetError: The pictures cannot be drawn.
        TrackingError: MLflow does not have the model, or does not answer.
        StorageError: The storage does not answer.
    """
    model = choice.load()
    images = read_images(files, model.image_size)
    prediction = model.predict(images, device=device)
    pictures = [] if prediction.maps is None else _draw(files, images, model, prediction, folder)
    lines = []
    for i, file in enumerate(files):
        probabilities = prediction.probabilities[i]
        classes = np.argsort(-probabilities, kind="stable")[:TOP]
        ranked = ", ".join(f"{model.class_names[k]} {probabilities[k]:.3f}" for k in classes)
        lines.append(f"{file}: {ranked}" + (f"  -> {pictures[i]}" if pictures else ""))
    if prediction.maps is None and model.weight == 0:
        lines.append("no picture: this model was trained with lambda = 0, so its decoder learned "
                     "no maps and what it makes is noise; a model of the approach impactx with "
                     "another lambda gives maps")
    elif prediction.maps is None:
        lines.append("no picture: this model gives classes only; a model of the approach impactx "
                     "gives maps as well")
    return "\n".join(lines)


def _draw(files: Sequence[Path], images: np.ndarray, model: TrainedModel, prediction: Prediction,
          folder: Path) -> list[Path]:
    assert prediction.maps is not None and model.map_kind is not None
    folder.mkdir(parents=True, exist_ok=True)
    limit = colour_limit(prediction.maps)
    paths: list[Path] = []
    for i, file in enumerate(files):
        path = folder / f"{file.stem}-map.png"
        if path in paths:
            path = folder / f"{file.stem}-map-{i}.png"
        label = int(prediction.labels[i])
        caption = f"{model.class_names[label]} {prediction.probabilities[i, label]:.2f}"
        draw_sheet(path, images[i:i + 1], prediction.maps[i:i + 1], [caption], limit=limit,
                   title=file.name, kind=model.map_kind)
        paths.append(path)
    return paths
