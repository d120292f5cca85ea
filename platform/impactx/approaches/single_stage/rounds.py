"""Rounds of maps in single-stage training (paper 3.3).

After every `explain_every` epochs the training images (or a share of them, drawn anew) are
explained: maps of the network's own C-logit of the true class, by the network as it is then. The
next epochs learn from them. Until the first round there is no map, and the loss is the cross
entropy alone.
"""

from __future__ import annotations

import copy
import io
import time
import zipfile
from typing import cast

import numpy as np
import torch
from torch import nn

from impactx.approaches.base import Bench
from impactx.approaches.single_stage.network import SingleStageNetwork
from impactx.datasets.batches import DeviceData
from impactx.explain.attribution import Attribution
from impactx.explain.maps.scale import largest_scale, map_scale
from impactx.explain.maps.store import StoreError
from impactx.models.logits import Logits
from impactx.training.loop import Metrics, ResumeError

BLOCK = 500  # images explained at once


class SelfExplanation:
    """The maps of the network under training, and their rounds (see `loop.BetweenEpochs`).

    The maps in force belong to the state of an interrupted training: they lie in a file of their
    own, named by the epoch after which they were made, and the one before stays until the
    checkpoint of that epoch is there.

    Args:
        bench: What the training has at hand.
        taught: The training part on the device, which the maps are handed to.
        maps: float32 (N, C, H, W), NaN where there is none yet; images of the validation part
            never get any. They are written in place.
        every: Epochs between two rounds.
        share: Share of the training images that a round explains, in (0, 1].
    """

    def __init__(self, bench: Bench, taught: DeviceData, maps: np.ndarray, *, every: int,
                 share: float) -> None:
        self.bench, self.taught, self.maps = bench, taught, maps
        self.every, self.share, self.seconds = every, share, 0.0
        self._training, self._files = bench.split.train, bench.files

    def chosen(self, epoch: int) -> np.ndarray:
        """Return the images that the round after this epoch explains, int64 ascending."""
        count = max(1, round(self.share * len(self._training)))
        if count == len(self._training):
            return self._training
        rng = np.random.default_rng([self.bench.seed, epoch])
        return np.sort(rng.choice(self._training, count, replace=False))

    def after_epoch(self, epoch: int, model: nn.Module) -> Metrics:
        """Make a round of maps where one is due, and return what it cost."""
        if epoch % self.every:
            return {}
        assert isinstance(model, SingleStageNetwork)
        started, rows = time.perf_counter(), self.chosen(epoch)
        self.maps[rows] = self._explain(model, rows)
        self._teach(model)
        if self._files is not None and self.bench.loop.rank == 0:
            explained, stream = self._explained(), io.BytesIO()
            np.savez(stream, indices=explained, maps=self.maps[explained])
            self._files.write(_file(epoch), stream.getvalue())
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {"explained_images": len(rows), "explain_seconds": seconds}

    def saved(self, epoch: int) -> None:
        """Delete the maps before this round: they are needed no longer."""
        before = epoch - self.every
        if self._files is not None and epoch % self.every == 0 and before > 0:
            self._files.delete(_file(before))

    def resume(self, epoch: int) -> None:
        """Read the maps that were in force after an epoch; the network holds what scaled them.

        Raises:
            ResumeError: They are missing or damaged.
        """
        last = epoch // self.every * self.every
        if not last:
            return
        if self._files is None:
            raise ResumeError("its maps were kept nowhere")
        try:
            with np.load(io.BytesIO(self._files.read(_file(last)))) as kept:
                self.maps[kept["indices"]] = kept["maps"]
        except (OSError, KeyError, ValueError, EOFError, IndexError, zipfile.BadZipFile) as error:
            raise ResumeError(
                f"its maps, {_file(last)}, are missing or damaged ({error})") from error
        self.taught.teach(self.maps, self._factor())

    def forget(self, epochs: int) -> None:
        """Delete what a finished training of so many epochs left."""
        if self._files is not None and self.bench.loop.rank == 0:
            for epoch in range(max(1, epochs // self.every - 1) * self.every, epochs + 1,
                               self.every):
                self._files.delete(_file(epoch))

    def _explained(self) -> np.ndarray:
        """Return the training images that have a map."""
        explained: np.ndarray = self._training[~np.isnan(self.maps[self._training, 0, 0, 0])]
        return explained

    def _factor(self) -> float | np.ndarray:
        rows = self._explained()
        if self.bench.map_scale == "max_abs":
            factor = np.ones(len(self.maps), np.float32)
            factor[rows] = largest_scale(self.maps[rows])
            return factor
        try:
            return map_scale(self.maps, rows, self.bench.map_scale)
        except StoreError:
            # A network that answers every image alike has maps of zeros, which no factor changes.
            return 1.0

    def _teach(self, model: SingleStageNetwork) -> None:
        factor = self._factor()
        self.taught.teach(self.maps, factor)
        model.factor.fill_(factor if isinstance(factor, float) else 0.0)

    def _explain(self, model: SingleStageNetwork, rows: np.ndarray) -> np.ndarray:
        """Return the rows' maps in their order; every worker makes its share and gets all."""
        net = copy.deepcopy(model).eval().float().requires_grad_(False)
        loop, data = self.bench.loop, self.bench.data
        # A new explainer each time: it keeps a model's fast form, and this model changes.
        explainer, score = cast(Attribution, self.bench.attribution), Logits(net).eval()
        blocks, own_rows = [], rows[loop.rank::loop.world_size]
        for start in range(0, len(own_rows), BLOCK):
            part = own_rows[start:start + BLOCK]
            blocks.append(explainer.explain(
                score, data.train.images[part], data.train.labels[part], device=loop.device,
                memory_bytes=self.bench.memory_bytes, indices=part).maps)
        shape = self.maps.shape[1:]
        own = np.concatenate(blocks) if blocks else np.empty((0, *shape), np.float32)
        if loop.world_size == 1:
            return own
        shares: list[np.ndarray] = [own] * loop.world_size
        torch.distributed.all_gather_object(shares, own)
        whole = np.empty((len(rows), *shape), np.float32)
        for rank, share in enumerate(shares):
            whole[rank::loop.world_size] = share
        return whole


def _file(epoch: int) -> str:
    return f"running-maps-{epoch:05d}.npz"
