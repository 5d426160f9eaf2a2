"""The optimiser, its schedule, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smca.gpu.config import OptimConfig
from smca.gpu.model import SMCADETR
from smca.gpu.training.muon import Muon, fast_dtype, matrices_of

DECAY_SHARE = 0.2
"""Of all steps: over the last ones, schedule="wsd" falls to 0."""


def learning_rate_factor(optim: OptimConfig, step: int, epoch: int, total_steps: int) -> float:
    """What the base learning rates are multiplied by at this step."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "step":
        return 0.1 if epoch >= optim.drop_epoch else 1.0
    if optim.schedule == "wsd":
        return min(1.0, max(0, total_steps - step) / (DECAY_SHARE * total_steps))
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: SMCADETR, optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or Muon and AdamW; with the backbone's own rates. AdamW's groups come first, each time the backbone's second."""
    if optim.backbone_lr == 0:
        model.backbone.requires_grad_(False)
    inside = {id(p) for p in model.backbone.parameters()}

    def groups(parameters: Sequence[Tensor], lr: float, backbone_lr: float) -> list[dict[str, Any]]:
        rest, backbone = [p for p in parameters if id(p) not in inside], [p for p in parameters if id(p) in inside]
        return [{"params": each, "lr": rate} for each, rate in ((rest, lr), (backbone, backbone_lr)) if each]

    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type in ("cuda", "cpu")
    if optim.optimizer == "adamw":
        every = groups(trained, optim.lr, optim.backbone_lr)
        return torch.optim.AdamW(every, weight_decay=optim.weight_decay, fused=fused)
    taken = matrices_of(model)
    matrices = groups(taken, optim.muon_lr, optim.muon_lr * optim.backbone_lr / optim.lr)
    ids = {id(p) for p in taken}
    others = groups([p for p in trained if id(p) not in ids], optim.lr, optim.backbone_lr)
    return Muon(others, matrices, fast_dtype(device), weight_decay=optim.weight_decay, fused=fused)


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
