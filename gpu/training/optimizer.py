"""The optimiser, its schedule, and the average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from smca.gpu.config import OptimConfig
from smca.gpu.model import SMCADETR


def learning_rate_factor(optim: OptimConfig, step: int, epoch: int, total_steps: int) -> float:
    """What the base learning rates are multiplied by at this step."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "step":
        return 0.1 if epoch >= optim.drop_epoch else 1.0
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: SMCADETR, optim: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with the backbone's own learning rate."""
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    if optim.backbone_lr == 0:
        model.backbone.requires_grad_(False)
        backbone = []
    inside = {id(p) for p in model.backbone.parameters()}
    groups = [{"params": [p for p in model.parameters() if id(p) not in inside], "lr": optim.lr}]
    if backbone:
        groups.append({"params": backbone, "lr": optim.backbone_lr})
    return torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=device.type in ("cuda", "cpu"))


def set_learning_rates(optimizer: torch.optim.Optimizer, base_lrs: list[float], factor: float) -> None:
    """Learning rate of each parameter group ← its base rate times `factor`."""
    for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base * factor


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 − decay)·model; whole numbers (batch counters) are copied."""
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    floats: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        (floats if pair[0].is_floating_point() else others).append(pair)
    torch._foreach_lerp_([a for a, _ in floats], [m for _, m in floats], 1 - decay)
    for a, m in others:
        a.copy_(m)
