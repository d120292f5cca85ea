"""The training loop: early stopping on validation accuracy, resumable at every epoch.

One process of `world_size` runs `fit` on its share of each batch; gradients are averaged by
torch's DistributedDataParallel where a process group exists, and batch norm is over all shares
together (see batch_norm).  All randomness of an epoch comes from (seed, epoch), so a resumed training
takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from impactx.datasets.batches import DeviceData
from impactx.settings import AugmentationSettings, TrainingSettings
from impactx.training.batch_norm import counted, join_batch_norms
from impactx.training.losses import Loss

Metrics = dict[str, float]
TOP = "common_accuracy"


class ResumeError(ValueError):
    """The state that an interrupted training left cannot be used."""


@dataclass(frozen=True)
class LoopArguments:
    """How a training is executed; none of it changes what comes out of it.

    Attributes:
        device: Where it is trained.
        load: Returns the state of an interrupted training, or None where there is none.
        save: Keeps the state of the training after each epoch, on rank 0.
        on_epoch: Called with the metrics of each epoch, on rank 0; a true answer stops the training.
        rank: Number of this worker, from 0.
        world_size: Number of data-parallel workers.
    """

    device: torch.device | str = "cpu"
    load: Callable[[], bytes | None] | None = None
    save: Callable[[bytes], None] | None = None
    on_epoch: Callable[[Metrics], object] | None = None
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class TrainingData:
    """train and validation images on the device; common: which validation rows all fractions share.

    common: bool (len(validation),).
    """

    train: DeviceData
    validation: DeviceData
    common: np.ndarray


class BetweenEpochs(Protocol):
    """Work after an epoch that changes what the next ones learn from; part of the state that a resumption needs."""

    def after_epoch(self, epoch: int, model: nn.Module) -> Metrics:
        """Called when an epoch is evaluated and another may follow. Returns what is added to the epoch's metrics."""

    def saved(self, epoch: int) -> None:
        """Called when the epoch's checkpoint lies there."""

    def resume(self, epoch: int) -> None:
        """Called where a training goes on after this epoch. Raises ResumeError where something is missing."""


@dataclass
class FitResult:
    """What a training left. Accuracies are fractions in [0, 1]; epochs count from 1.

    history: one dict an epoch (epoch, train_*, val_*, common_accuracy, seconds); best_state: the state
    dict of the epoch with the best validation accuracy (the first of equals), on the CPU; stopped: on_epoch
    asked for the end, the training could go on.
    """

    history: list[Metrics] = field(default_factory=list)
    best_epoch: int = 0
    best_state: dict[str, Tensor] | None = None
    diverged: bool = False
    stopped: bool = False

    @property
    def best(self) -> Metrics:
        """The metrics of the best epoch. Raises ValueError where no epoch had a finite loss."""
        if not self.best_epoch:
            raise ValueError("the training diverged in its first epoch: it has no best epoch")
        return self.history[self.best_epoch - 1]


def make_autocast(training: TrainingSettings, device: torch.device) -> contextlib.AbstractContextManager:
    """The context of a forward: bfloat16 autocast where training.precision asks for it (auto: on a GPU)."""
    mixed = training.precision == "bfloat16" or (training.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext()


def make_optimizer(parameters: list[nn.Parameter], training: TrainingSettings, lr: float) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over these parameters; SGD has Nesterov momentum 0.9."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=training.weight_decay)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    # The fused form takes one pass over the parameters instead of a dozen; measured by benchmark.py train.
    return kind(parameters, lr=lr, weight_decay=training.weight_decay, fused=True)


def _summed(values: Tensor, world_size: int) -> Tensor:
    if world_size > 1:
        torch.distributed.all_reduce(values)
    return values


@torch.no_grad()
def evaluate(model: nn.Module, data: DeviceData, loss: Loss, *, common: np.ndarray | None = None,
             batch_size: int = 500, rank: int = 0, world_size: int = 1,
             training: TrainingSettings | None = None) -> Metrics:
    """Mean loss terms and accuracy in [0, 1] over all images of data (of all workers together).

    common: bool (len(data),): adds `common_accuracy`, the accuracy over these rows alone.
    """
    was_training = model.training
    model.eval()
    mask = torch.from_numpy(np.ones(len(data), bool) if common is None else common).to(data.device)[rank::world_size]
    correct = torch.zeros(2, dtype=torch.float64, device=data.device)
    sums: dict[str, Tensor] = {}
    seen = 0
    with make_autocast(training or TrainingSettings(), data.device):
        for batch in data.evaluation(batch_size=batch_size, rank=rank, world_size=world_size):
            logits, terms = loss(model, batch)
            hit = logits.argmax(1) == batch.labels
            correct += torch.stack([hit.sum(), (hit & mask[seen:seen + len(hit)]).sum()])
            seen += len(hit)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.double()
    model.train(was_training)
    keys = sorted(sums)
    total = _summed(torch.stack([*correct, *(sums[k] for k in keys)]), world_size).tolist()
    result = dict(zip(keys, total[2:], strict=True)) | {"accuracy": total[0] / len(data)}
    if common is not None:
        result[TOP] = total[1] / max(int(common.sum()), 1)
    return result


def train_epoch(model: nn.Module, batches: Iterator, loss: Loss, optimizer: torch.optim.Optimizer,
                 autocast: Callable[[], contextlib.AbstractContextManager], images: int, world_size: int) -> Metrics:
    """One pass over an epoch's batches; autocast: makes the context of each forward.

    Returns means over the `images` of all workers, as they were seen: the loss terms and the accuracy.
    Raises ValueError where there is no batch.
    """
    sums: Tensor | None = None
    keys: list[str] = []
    for batch in batches:
        with autocast():
            logits, terms = loss(model, batch)
        # DistributedDataParallel averages over workers; shares are weighted parts of one global mean.
        (terms["loss"] * world_size if world_size > 1 else terms["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keys = list(terms)
        # w_i = 1 / B_global: a term times B_global is its sum over the share. Kept on the device: no sync a step.
        hits = ((logits.detach().argmax(1) == batch.labels) * (batch.weights > 0)).sum()
        row = torch.stack([hits.double(), *(v.detach().double() * batch.total for v in terms.values())])
        sums = row if sums is None else sums + row
    if sums is None:
        raise ValueError("there is no training image")
    values = (_summed(sums, world_size) / images).tolist()
    return dict(zip(keys, values[1:], strict=True)) | {"accuracy": values[0]}


def fit(model: nn.Module, loss: Loss, data: TrainingData, training: TrainingSettings, *, learning_rate: float,
        batch_size: int, augmentation: AugmentationSettings, seed: int, validation_loss: Loss | None = None,
        load: Callable[[], bytes | None] | None = None, save: Callable[[bytes], None] | None = None,
        on_epoch: Callable[[Metrics], object] | None = None, between: BetweenEpochs | None = None, rank: int = 0,
        world_size: int = 1) -> FitResult:
    """Train until validation accuracy has not risen for `patience` epochs, or `epochs` are done.

    model: on data's device; parameters with requires_grad are trained. load/save: the bytes of the last
    epoch's checkpoint (None where there is none yet); only rank 0 saves. on_epoch: called after each epoch
    that is computed here, on rank 0; what it raises ends the training, resumable, and so does a true answer
    (`stopped`), with one worker only. between: what is done between two epochs, on every rank. With world_size
    > 1 a torch process group must exist. A loss that is not finite ends the training with diverged = True.
    Raises ResumeError where what `load` returned cannot be used.
    """
    device = data.train.device
    model.to(memory_format=torch.channels_last)  # as the batches are: 1.4 times faster on a CPU (docs/LOG.md)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], training, learning_rate)
    result = FitResult()
    if load is not None and (stored := load()) is not None:
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(stored), map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            result = FitResult(state["history"], state["best_epoch"], state["best_state"], state["diverged"])
        except Exception as error:  # torch has no one class for what is torn or of another model
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ResumeError("the state of the interrupted training is damaged or of another model "
                              f"({reason})") from error
        if between is not None and not _over(result, training):
            between.resume(len(result.history))
    step_model, joined = model, []
    if world_size > 1:
        joined = join_batch_norms(model, device)
        step_model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None)
    if training.compile == "always":
        step_model = torch.compile(step_model)
    autocast = lambda: make_autocast(training, device)  # noqa: E731
    while not _over(result, training):
        epoch = len(result.history) + 1
        started = time.perf_counter()
        # The draws of stochastic layers (dropout) are the epoch's own, and nobody else's RNG is touched.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((seed * 1_000_003 + epoch) * 4096 + rank)
            step_model.train()
            batches = data.train.training(seed=seed, epoch=epoch, batch_size=batch_size, augmentation=augmentation,
                                          rank=rank, world_size=world_size)
            row = {f"train_{k}": v for k, v in train_epoch(
                step_model, counted(joined, batches), loss, optimizer, autocast, len(data.train), world_size).items()}
        found = evaluate(model, data.validation, validation_loss or loss, common=data.common, training=training,
                         batch_size=training.eval_batch_size, rank=rank, world_size=world_size)
        row |= {k if k == TOP else f"val_{k}": v for k, v in found.items()}
        row["epoch"] = epoch
        result.diverged = not (math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]))
        result.history.append(row)
        if not result.diverged and (not result.best_epoch
                                    or row["val_accuracy"] > result.best["val_accuracy"]):
            result.best_epoch = epoch
            result.best_state = copy.deepcopy({k: v.detach().cpu() for k, v in model.state_dict().items()})
        if between is not None and not _over(result, training):
            row |= between.after_epoch(epoch, model)
        row["seconds"] = time.perf_counter() - started
        if rank == 0:
            if save is not None:
                save(_checkpoint(model, optimizer, result))
                if between is not None:
                    between.saved(epoch)
            if on_epoch is not None and on_epoch(row) and world_size == 1:
                result.stopped = not _over(result, training)
                break
    return result


def _over(result: FitResult, training: TrainingSettings) -> bool:
    done = len(result.history)
    return result.diverged or done >= training.epochs or done - result.best_epoch >= training.patience


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, result: FitResult) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": result.history,
                "best_epoch": result.best_epoch, "best_state": result.best_state,
                "diverged": result.diverged}, stream)
    return stream.getvalue()
