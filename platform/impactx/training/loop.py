"""The training loop: early stopping on validation accuracy, resumable at every epoch.

One process of `world_size` runs `fit` on its share of each batch; gradients are averaged by torch's
DistributedDataParallel where a process group exists, and batch norm is over all shares together
(see batch_norm). All randomness of an epoch comes from (seed, epoch), so a resumed training takes
the same steps as one that was never interrupted.
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

from impactx.datasets.batches import Batch, DeviceData
from impactx.settings import AugmentationSettings, TrainingSettings
from impactx.training.batch_norm import JoinedBatchNorm, counted, join_batch_norms
from impactx.training.losses import Loss

Metrics = dict[str, float]
Context = contextlib.AbstractContextManager[object]
TOP = "common_accuracy"


class ResumeError(ValueError):
    """The state of an interrupted training cannot be used."""


@dataclass(frozen=True)
class LoopArguments:
    """How a training is executed; none of it changes what comes out of it.

    Attributes:
        device: Where it is trained.
        load: Returns the state of an interrupted training, or None where there is none.
        save: Keeps the state of the training after each epoch, on rank 0.
        on_epoch: Called with the metrics of each epoch, on rank 0; a true answer ends it.
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
    """The images of a training on the device.

    Attributes:
        train: The training part.
        validation: The validation part.
        common: bool (len(validation),): rows that the validation parts of all fractions share.
    """

    train: DeviceData
    validation: DeviceData
    common: np.ndarray


class BetweenEpochs(Protocol):
    """Work after an epoch that changes what the next ones learn from.

    It is part of the state that a resumption needs.
    """

    def after_epoch(self, epoch: int, model: nn.Module) -> Metrics:
        """Return what is added to an epoch's metrics, once it is evaluated and another may follow.

        Args:
            epoch: From 1.
            model: The network as it is after the epoch.
        """

    def saved(self, epoch: int) -> None:
        """Take note that the epoch's checkpoint is kept."""

    def resume(self, epoch: int) -> None:
        """Restore the state after this epoch, from which a training goes on.

        Raises:
            ResumeError: Something is missing.
        """


@dataclass
class FitResult:
    """What a training left. Accuracies are fractions in [0, 1].

    Attributes:
        history: One dict for each epoch (epoch, train_*, val_*, common_accuracy, seconds).
        best_epoch: The epoch, from 1, with the best validation accuracy, the first of equals; 0
            where none had a finite loss.
        best_state: The state dict of that epoch, on the CPU.
        diverged: Whether the loss of the last epoch was not finite.
        stopped: Whether on_epoch asked for the end; the training could go on.
        fallback: Why float32 took the place of bfloat16; None where it did not.
    """

    history: list[Metrics] = field(default_factory=list)
    best_epoch: int = 0
    best_state: dict[str, Tensor] | None = None
    diverged: bool = False
    stopped: bool = False
    fallback: str | None = None

    @property
    def best(self) -> Metrics:
        """The metrics of the best epoch.

        Raises:
            ValueError: No epoch had a finite loss.
        """
        if not self.best_epoch:
            raise ValueError("the training diverged in its first epoch: it has no best epoch")
        return self.history[self.best_epoch - 1]


def precision_of(training: TrainingSettings, device: torch.device) -> str:
    """Return the precision of forward passes that the settings choose on a device."""
    if training.precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return training.precision


def make_autocast(training: TrainingSettings, device: torch.device) -> Context:
    """Return the context of a forward pass: autocast where its precision is bfloat16."""
    mixed = precision_of(training, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if mixed else contextlib.nullcontext()


def refuses_bfloat16(model: nn.Module, loss: Loss, data: DeviceData, training: TrainingSettings
                     ) -> str | None:
    """Return why the network cannot be trained in bfloat16, or None where it can or need not be.

    Two images go forward and back, in evaluation mode, which changes nothing of the network.

    Raises:
        torch.OutOfMemoryError: The device is full.
    """
    autocast, was_training = make_autocast(training, data.device), model.training
    if isinstance(autocast, contextlib.nullcontext):
        return None
    devices = [data.device] if data.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            with autocast:
                _, terms = loss(model.eval(), next(data.evaluation(batch_size=2)))
            terms["loss"].backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:  # an operation or a mixture of types
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
    return None


def make_optimizer(parameters: list[nn.Parameter], training: TrainingSettings, lr: float
                   ) -> torch.optim.Optimizer:
    """Return the optimiser that the settings name; SGD has Nesterov momentum 0.9.

    Args:
        parameters: What it changes.
        training: Names it, with its weight decay.
        lr: Learning rate.
    """
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True,
                               weight_decay=training.weight_decay)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    # The fused form takes one pass over the parameters instead of a dozen; measured by
    # benchmark.py train.
    return kind(parameters, lr=lr, weight_decay=training.weight_decay, fused=True)


def _summed(values: Tensor, world_size: int) -> Tensor:
    if world_size > 1:
        torch.distributed.all_reduce(values)
    return values


@torch.no_grad()
def evaluate(model: nn.Module, data: DeviceData, loss: Loss, *, common: np.ndarray | None = None,
             batch_size: int = 500, rank: int = 0, world_size: int = 1,
             training: TrainingSettings | None = None) -> Metrics:
    """Return mean loss terms and accuracy in [0, 1] over all images (of all workers together).

    Args:
        model: The network; its mode is restored.
        data: The images on the device.
        loss: Gives logits and terms.
        common: bool (len(data),): adds `common_accuracy`, the accuracy over these rows alone.
        batch_size: Images of a forward pass, over all workers.
        rank: Number of this worker.
        world_size: Number of workers.
        training: Gives the precision; None: the default.
    """
    was_training = model.training
    model.eval()
    rows = np.ones(len(data), bool) if common is None else common
    mask = torch.from_numpy(rows).to(data.device)[rank::world_size]
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


def train_epoch(model: nn.Module, batches: Iterator[Batch], loss: Loss,
                optimizer: torch.optim.Optimizer, autocast: Callable[[], Context], images: int,
                world_size: int) -> Metrics:
    """Take one step for each of an epoch's batches.

    Args:
        model: The network, in training mode.
        batches: This worker's shares.
        loss: Gives logits and terms.
        optimizer: Over the network's parameters.
        autocast: Makes the context of each forward pass.
        images: Number of images of all workers.
        world_size: Number of workers.

    Returns:
        Means over the images of all workers, as they were seen: the loss terms and the accuracy.

    Raises:
        ValueError: There is no batch.
    """
    sums: Tensor | None = None
    keys: list[str] = []
    for batch in batches:
        with autocast():
            logits, terms = loss(model, batch)
        # DistributedDataParallel averages over workers; shares are weighted parts of one mean.
        minimised = terms["loss"] * world_size if world_size > 1 else terms["loss"]
        minimised.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keys = list(terms)
        # w_i = 1 / B_global: a term times B_global is its sum over the share. It is kept on the
        # device, so that no step waits for it.
        hits = ((logits.detach().argmax(1) == batch.labels) * (batch.weights > 0)).sum()
        row = torch.stack(
            [hits.double(), *(v.detach().double() * batch.total for v in terms.values())])
        sums = row if sums is None else sums + row
    if sums is None:
        raise ValueError("there is no training image")
    values = (_summed(sums, world_size) / images).tolist()
    return dict(zip(keys, values[1:], strict=True)) | {"accuracy": values[0]}


def fit(model: nn.Module, loss: Loss, data: TrainingData, training: TrainingSettings, *,
        learning_rate: float, batch_size: int, augmentation: AugmentationSettings, seed: int,
        validation_loss: Loss | None = None, load: Callable[[], bytes | None] | None = None,
        save: Callable[[bytes], None] | None = None,
        on_epoch: Callable[[Metrics], object] | None = None,
        between: BetweenEpochs | None = None, rank: int = 0, world_size: int = 1) -> FitResult:
    """Train until validation accuracy has not risen for `patience` epochs, or `epochs` are done.

    A loss that is not finite ends the training with diverged = True.

    Args:
        model: On data's device; parameters with requires_grad are trained.
        loss: What is minimised.
        data: Training and validation part.
        training: The settings of the loop.
        learning_rate: Of the optimiser.
        batch_size: Images of a batch, over all workers.
        augmentation: Of training images and maps.
        seed: Of order, augmentation and stochastic layers.
        validation_loss: For the validation part; None: the loss itself.
        load: Returns the bytes of the last epoch's checkpoint, or None where there is none.
        save: Keeps the bytes of an epoch's checkpoint; only rank 0 saves.
        on_epoch: Called after each epoch that is computed here, on rank 0. An exception ends the
            training, resumable, and so does a true answer (`stopped`), with one worker only.
        between: Work between two epochs, on every rank.
        rank: Number of this worker.
        world_size: Number of workers; with more than one a torch process group must exist.

    Raises:
        ResumeError: What `load` returned cannot be used.
    """
    device = data.train.device
    if fallback := refuses_bfloat16(model, loss, data.train, training):
        training = training.model_copy(update={"precision": "float32"})
    # As the batches are: 1.4 times faster on a CPU (docs/LOG.md).
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], training,
                               learning_rate)
    result = FitResult()
    if load is not None and (stored := load()) is not None:
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(stored), map_location=device,
                                               weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            result = FitResult(state["history"], state["best_epoch"], state["best_state"],
                               state["diverged"])
        except Exception as error:  # torch has no one class for what is torn or of another model
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ResumeError("the state of the interrupted training is damaged or of another "
                              f"model ({reason})") from error
        if between is not None and not _over(result, training):
            between.resume(len(result.history))
    step_model, joined = model, list[JoinedBatchNorm]()
    if world_size > 1:
        joined = join_batch_norms(model, device)
        step_model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None)
    if training.compile == "always":
        compiled: Any = torch.compile(step_model)
        step_model = compiled
    while not _over(result, training):
        epoch = len(result.history) + 1
        started = time.perf_counter()
        # The draws of stochastic layers (dropout) are the epoch's own, and nobody else's RNG is
        # touched.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((seed * 1_000_003 + epoch) * 4096 + rank)
            step_model.train()
            batches = data.train.training(
                seed=seed, epoch=epoch, batch_size=batch_size, augmentation=augmentation, rank=rank,
                world_size=world_size)
            trained = train_epoch(
                step_model, counted(joined, batches), loss, optimizer,
                lambda: make_autocast(training, device), len(data.train), world_size)
            row = {f"train_{k}": v for k, v in trained.items()}
        evaluated = evaluate(
            model, data.validation, validation_loss or loss, common=data.common, training=training,
            batch_size=training.eval_batch_size, rank=rank, world_size=world_size)
        row |= {k if k == TOP else f"val_{k}": v for k, v in evaluated.items()}
        row["epoch"] = epoch
        result.diverged = not (
            math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]))
        result.history.append(row)
        if not result.diverged and (not result.best_epoch
                                    or row["val_accuracy"] > result.best["val_accuracy"]):
            result.best_epoch = epoch
            result.best_state = copy.deepcopy(
                {k: v.detach().cpu() for k, v in model.state_dict().items()})
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
    result.fallback = fallback
    return result


def _over(result: FitResult, training: TrainingSettings) -> bool:
    done = len(result.history)
    return (result.diverged or done >= training.epochs
            or done - result.best_epoch >= training.patience)


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, result: FitResult
                ) -> bytes:
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "history": result.history, "best_epoch": result.best_epoch,
                "best_state": result.best_state, "diverged": result.diverged}, stream)
    return stream.getvalue()
