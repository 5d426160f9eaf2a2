"""Batch norm over the images of all processes, so that a step does not depend on how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    all_reduce: Callable[[Tensor], Tensor]
else:
    from torch.distributed.nn.functional import all_reduce  # whose gradient is summed over all processes, too


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of all processes in training: on a CPU what ``nn.SyncBatchNorm`` is on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        channels = (1, -1, 1, 1)
        values = x.float()
        count = all_reduce(values.new_tensor([float(values.numel() // values.shape[1])]))
        mean = all_reduce(values.sum((0, 2, 3))) / count
        centred = values - mean.view(channels)
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
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
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if (
            type(module) is nn.BatchNorm2d
            and module.track_running_stats
            and module.affine
            and module.momentum is not None
        ):
            module.__class__ = SyncedBatchNorm2d
