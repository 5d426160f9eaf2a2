"""Batch norm that keeps what was learned before, for batches too small to estimate statistics from."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics and parameters: y = scale·x + shift. It keeps what was learned before and trains nothing."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    zeros: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        ones = torch.ones(norm.num_features)
        self.register_buffer("weight", ones if norm.weight is None else norm.weight.detach().clone())
        self.register_buffer("bias", ones * 0 if norm.bias is None else norm.bias.detach().clone())
        self.register_buffer("running_mean", ones * 0 if norm.running_mean is None else norm.running_mean.clone())
        self.register_buffer("running_var", ones if norm.running_var is None else norm.running_var.clone())
        self.register_buffer("zeros", ones * 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], in the dtype of x."""
        statistics = (self.running_mean, self.running_var, self.weight, self.bias, self.zeros)
        return cast(Tensor, _Normalize.apply(x, *statistics, self.eps))  # type: ignore[no-untyped-call]

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """[C] and [C]: what it does, y = scale·x + shift, for a convolution before it to do at once."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class _Normalize(torch.autograd.Function):
    """Batch norm with fixed statistics and no trained parameters. Unlike ``batch_norm``, it does not keep x for the backward pass;
    the kernel of ``batch_norm`` serves both directions, since the gradient is scaled as x is. (Written as arithmetic on broadcast
    tensors, it takes half as long again on a GPU, and a third of a training step's launches.)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, zeros: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(var, weight, zeros)
        ctx.eps = eps
        return functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        var, weight, zeros = ctx.saved_tensors
        return functional.batch_norm(grad, zeros, var, weight, zeros, training=False, eps=ctx.eps), *[None] * 6


def freeze_batch_norm(module: nn.Module, *, only_untrained: bool = False) -> None:
    """Replace every BatchNorm2d below `module` by a ``FrozenBatchNorm`` with the same values, in place; or only those whose
    parameters are not trained."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            untrained = child.weight is not None and not child.weight.requires_grad
            if untrained or not only_untrained:
                setattr(module, name, FrozenBatchNorm(child))
        else:
            freeze_batch_norm(child, only_untrained=only_untrained)
