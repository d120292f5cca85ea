"""Batch norm over the workers of a data-parallel training on CPUs, for which torch's SyncBatchNorm is not made.

Each worker normalises its share of a batch by the mean and the variance of the whole, so that a step is that of one
worker with all of it.  On GPUs torch's own does this.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from impactx.datasets.batches import Batch


def join_batch_norms(model: nn.Module, device: torch.device) -> list[JoinedBatchNorm]:
    """Let a model's batch norms take their statistics over all workers, in place; names and tensors stay.

    Returns those that `counted` must be told of: on a CPU all, on a GPU none.
    """
    if not any(isinstance(layer, _BatchNorm) for layer in model.modules()):
        return []
    if device.type == "cuda":
        from timm.layers import (
            convert_sync_batchnorm,  # torch's converter drops the activation in BatchNormAct2d
        )

        convert_sync_batchnorm(model)
        return []
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, JoinedBatchNorm):
            layer.__class__ = _joined(type(layer))
    return [layer for layer in model.modules() if isinstance(layer, JoinedBatchNorm)]


def counted(layers: list[JoinedBatchNorm], batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the images of weight 0 of a worker without a share are kept out of the statistics."""
    for batch in batches:
        for layer in layers:
            layer.counts = bool(batch.weights.any())
        yield batch


class JoinedBatchNorm(_BatchNorm):
    """What `join_batch_norms` makes of a batch norm: (B, C) or (B, C, ...) -> the same shape, B as each worker has it.

    In training mode every worker of the default process group must call it, and go backward, in the same order;
    ValueError where all of them together have less than two values a channel.  In evaluation mode, as frozen layers
    are, and without a process group it is what it was made of.

    counts: this worker's values are part of the statistics (see `counted`).
    """

    counts = True

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        y = self._normalised(x)
        # What timm's BatchNormAct2d does besides.
        for name in ("drop", "act"):
            if (then := getattr(self, name, None)) is not None:
                y = then(y)
        return y

    @torch.compiler.disable  # its exchange is not for a compiler to reorder
    def _normalised(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        counts = self.counts and x.numel() > 0
        n, mean, variance = _statistics(x.detach(), counts)
        if n < 2:
            raise ValueError(f"expected more than 1 value per channel over all workers when training, got {n:.0f}")
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), share)
            self.running_var.lerp_((variance * (n / (n - 1))).to(self.running_var), share)
        precision = torch.promote_types(x.dtype, torch.float32)
        return _Normalise.apply(x, self.weight, self.bias, mean.to(precision), variance.to(precision), n, self.eps,
                                counts)


@functools.cache
def _joined(kind: type[_BatchNorm]) -> type[JoinedBatchNorm]:
    """A batch norm's class with the statistics of all workers: its input check and evaluation stay its own."""
    return type(f"Joined{kind.__name__}", (JoinedBatchNorm, kind), {})


def _statistics(x: Tensor, counts: bool) -> tuple[float, Tensor, Tensor]:
    """Values a channel, their mean (C,) and biased variance (C,), float64, over all workers.

    Deviations are from means, never a difference of large sums: Chan, Golub and LeVeque, 1983, equation (2.1).
    """
    own = x.new_zeros(3, x.shape[1], dtype=torch.float64)  # values, mean, variance
    if counts:
        own[0] = x.numel() / x.shape[1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own[1], own[2] = torch.batch_norm_update_stats(wide, None, None, 0.0)  # what nn.BatchNorm itself calls
    shares = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, own)
    values, means, variances = torch.stack(shares, dim=1)
    weights = values / values.sum(0)
    mean = (weights * means).sum(0)
    return float(values[:, 0].sum()), mean, (weights * (variances + (means - mean).square())).sum(0)


class _Normalise(torch.autograd.Function):
    """weight * (x - mean) / sqrt(variance + eps) + bias, where mean and variance are functions of all workers' x.

    The gradients of weight and bias are those of the own share, as DistributedDataParallel adds them up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor,
                n: float, eps: float, counts: bool) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.n, ctx.eps, ctx.counts = n, eps, counts
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        # As if mean and variance were constants; sums[0] = Σ grad * (x - mean) / deviation, sums[1] = Σ grad.
        grad_x, sums = grad, [torch.zeros_like(mean)] * 2
        if x.numel():  # the operation divides by it
            grad_x, *sums = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        total = torch.stack(sums).to(torch.float64, copy=True)
        torch.distributed.all_reduce(total)
        if ctx.counts:
            inverse = (variance.double() + ctx.eps).rsqrt()
            scale = inverse / ctx.n if weight is None else inverse * weight / ctx.n
            slope, shift = (v.to(mean).view(-1, *[1] * (x.dim() - 2)) for v in (scale * inverse * total[0],
                                                                              scale * total[1]))
            away = x - mean.view(-1, *[1] * (x.dim() - 2))
            grad_x = (grad_x - shift - away * slope).to(x)
        return grad_x, *(s if needed else None for s, needed in zip(sums, ctx.needs_input_grad[1:3], strict=True)), \
            None, None, None, None, None
