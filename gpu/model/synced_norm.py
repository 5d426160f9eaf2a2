"""Batch norm over the images of all processes, so that a step does not depend on how many there are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed, nn


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        distributed.all_reduce(grad)
        return grad


def _sum(x: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(x))  # type: ignore[no-untyped-call]


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of all processes in training: on a CPU what ``nn.SyncBatchNorm`` is on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        channels = (1, -1, 1, 1)
        values = x if x.dtype == torch.float64 else x.float()
        count = _sum(values.new_tensor([float(values.numel() // values.shape[1])]))
        mean = _sum(values.sum((0, 2, 3))) / count
        centred = values - mean.view(channels)
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None  # these norms keep statistics
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale.view(channels) + self.bias.view(channels)).to(x.dtype)


def synchronize_norms(model: nn.Module, device: torch.device) -> None:
    """Let the batch norms of `model`, in place, see the images of all processes, where they learn from images at all."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if (
            type(module) is nn.BatchNorm2d
            and module.track_running_stats
            and module.affine
            and module.momentum is not None
        ):
            module.__class__ = SyncedBatchNorm2d
