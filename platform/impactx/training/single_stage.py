"""Single-stage training (paper 3.3; DESIGN section 4): all modules at once, on maps of the network itself.

After every `explain_every` epochs the training images (or a share of them, drawn anew) are explained: maps of
IMPACTX's own C-logit of the true class, by the network as it is then.  The next epochs learn from them.  Until the
first round there is no map and the loss is the cross entropy alone.
"""

from __future__ import annotations

import copy
import io
import time
import zipfile
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from impactx.datasets import Dataset, Split
from impactx.datasets.batches import Batch, DeviceData
from impactx.explain.attribution import Attribution
from impactx.explain.maps.scale import largest_scale, map_scale
from impactx.explain.maps.store import StoreError
from impactx.models import SingleStageImpactx, build_single_stage
from impactx.models.logits import Logits
from impactx.settings import (
    ModelSettings,
    SingleStageSettings,
    TrainingSettings,
)
from impactx.training.loop import FitResult, Metrics, ResumeError, TrainingData
from impactx.training.losses import single_stage_loss
from impactx.training.stages import device_parts, dtype_of, fit_best

BLOCK = 500  # images explained at once


class Files(Protocol):
    """Where a running training keeps what is too large for its checkpoint."""

    def write(self, name: str, content: bytes) -> None:
        """Keep a file, whole or not at all."""

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def delete(self, name: str) -> None:
        """Absent is fine."""


class SelfExplanation:
    """The maps of the network under training, and their rounds (see loop.BetweenEpochs).

    maps: float32 (N, C, H, W), NaN where there is none yet; images of the validation part never get any.
    The maps in force belong to the state of an interrupted training: they lie in a file of their own, named by the
    epoch after which they were made, and the one before stays until the checkpoint of that epoch is there.
    """

    def __init__(self, data: Dataset, split: Split, taught: DeviceData, maps: np.ndarray, *,
                 attribution: Attribution, approach: SingleStageSettings, scale: str, seed: int,
                 device: torch.device | str, memory_bytes: int, files: Files | None, rank: int = 0,
                 world_size: int = 1) -> None:
        self.data, self.split, self.taught, self.maps = data, split, taught, maps
        self.attribution, self.approach, self.scale, self.seed = attribution, approach, scale, seed
        self.device, self.memory_bytes, self.files = device, memory_bytes, files
        self.rank, self.world_size = rank, world_size
        self.seconds = 0.0

    def chosen(self, epoch: int) -> np.ndarray:
        """The training images that the round after this epoch explains, int64 ascending."""
        count = max(1, round(self.approach.explain_share * len(self.split.train)))
        if count == len(self.split.train):
            return self.split.train
        return np.sort(np.random.default_rng([self.seed, epoch]).choice(self.split.train, count, replace=False))

    def after_epoch(self, epoch: int, model: nn.Module) -> Metrics:
        """A round of maps, where one is due."""
        if epoch % self.approach.explain_every:
            return {}
        started, rows = time.perf_counter(), self.chosen(epoch)
        self.maps[rows] = self._explain(model, rows)
        self._teach(model)
        if self.files is not None and self.rank == 0:
            there, stream = self._there(), io.BytesIO()
            np.savez(stream, indices=there, maps=self.maps[there])
            self.files.write(_file(epoch), stream.getvalue())
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {"explained_images": len(rows), "explain_seconds": seconds}

    def saved(self, epoch: int) -> None:
        """The maps before this round are needed no longer."""
        before = epoch - self.approach.explain_every
        if self.files is not None and epoch % self.approach.explain_every == 0 and before > 0:
            self.files.delete(_file(before))

    def resume(self, epoch: int) -> None:
        """Read the maps that were in force. (What scaled them is a buffer of the network.)"""
        if not (made := epoch // self.approach.explain_every * self.approach.explain_every):
            return
        if self.files is None:
            raise ResumeError("its maps were kept nowhere")
        try:
            with np.load(io.BytesIO(self.files.read(_file(made)))) as kept:
                self.maps[kept["indices"]] = kept["maps"]
        except (OSError, KeyError, ValueError, EOFError, IndexError, zipfile.BadZipFile) as error:
            raise ResumeError(f"its maps, {_file(made)}, are missing or damaged ({error})") from error
        self.taught.teach(self.maps, self._factor())

    def forget(self, epochs: int) -> None:
        """Delete what a finished training of so many epochs left."""
        if self.files is not None and self.rank == 0:
            every = self.approach.explain_every
            for epoch in range(max(1, epochs // every - 1) * every, epochs + 1, every):
                self.files.delete(_file(epoch))

    def _there(self) -> np.ndarray:
        return self.split.train[~np.isnan(self.maps[self.split.train, 0, 0, 0])]

    def _factor(self) -> float | np.ndarray:
        rows = self._there()
        if self.scale == "max_abs":
            factor = np.ones(len(self.maps), np.float32)
            factor[rows] = largest_scale(self.maps[rows])
            return factor
        try:
            return map_scale(self.maps, rows, self.scale)
        except StoreError:  # a network that answers every image alike has maps of zeros, which no factor changes
            return 1.0

    def _teach(self, model: nn.Module) -> None:
        factor = self._factor()
        self.taught.teach(self.maps, factor)
        model.factor.fill_(factor if isinstance(factor, float) else 0.0)  # type: ignore[operator,union-attr]

    def _explain(self, model: nn.Module, rows: np.ndarray) -> np.ndarray:
        """The rows' maps, in their order; every worker makes its share and gets all."""
        net = copy.deepcopy(model).eval().float().requires_grad_(False)
        score, found = Logits(net).eval(), []
        mine = rows[self.rank::self.world_size]
        for start in range(0, len(mine), BLOCK):
            part = mine[start:start + BLOCK]
            found.append(self.attribution.explain(
                score, self.data.train.images[part], self.data.train.labels[part], device=self.device,
                memory_bytes=self.memory_bytes, indices=part).maps)
        own = np.concatenate(found) if found else np.empty((0, *self.maps.shape[1:]), np.float32)
        if self.world_size == 1:
            return own
        shares: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(shares, own)
        whole = np.empty((len(rows), *self.maps.shape[1:]), np.float32)
        for rank, share in enumerate(shares):
            whole[rank::self.world_size] = share
        return whole


def train_single_stage(data: Dataset, split: Split, model: ModelSettings, training: TrainingSettings, *,
                       approach: SingleStageSettings, attribution: Attribution, weight: float, scale: str,
                       seed: int, device: torch.device | str = "cpu", memory_bytes: int = 2**29,
                       files: Files | None = None, rank: int = 0, world_size: int = 1,
                       **how: Any) -> tuple[SingleStageImpactx, FitResult]:
    """Train IMPACTX in a single stage by equation (1) with lambda = weight.

    attribution: makes the maps; scale: std, max_abs or raw (setting maps.scale), fitted anew in every round; files:
    where maps are kept for a resumption; else as `train_stage1`. Epochs with a round of maps have explained_images
    and explain_seconds in the history, and `seconds` has both.
    """
    net = build_single_stage(approach, model, data.num_classes, data.image_size, seed=seed, channels=data.channels)
    net.to(device, dtype_of(training))
    maps = np.full((len(data.train.labels), data.channels, *data.image_size), np.nan, np.float32)
    train, validation = device_parts(data, split, training, device, maps, pending=True)
    between = SelfExplanation(data, split, train, maps, attribution=attribution, approach=approach, scale=scale,
                              seed=seed, device=device, memory_bytes=memory_bytes, files=files, rank=rank,
                              world_size=world_size)
    parts = TrainingData(train, validation, np.isin(split.validation, split.common))
    result = fit_best(net, single_stage_loss(weight, approach.auxiliary), parts, training, seed=seed,
                      validation_loss=_classification, between=between, rank=rank, world_size=world_size, **how)
    if not result.stopped:
        between.forget(len(result.history))
    return net, result


def _classification(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The cross entropy of C's logits: images of the validation part have no maps."""
    logits = model(batch.images)[0]
    ce = (nn.functional.cross_entropy(logits, batch.labels, reduction="none") * batch.weights).sum()
    return logits, {"loss": ce}


def _file(epoch: int) -> str:
    return f"running-maps-{epoch:05d}.npz"
