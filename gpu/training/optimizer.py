"""The optimiser, its schedule, and the average of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smca.gpu.config import OptimConfig
from smca.gpu.model import SMCADETR
from smca.gpu.training.muon import Muon, fast_dtype, matrices_of
from smca.gpu.training.sharding import local

DECAY_SHARE = 0.2
"""Of all steps: over the last ones, schedule="wsd" falls to 0."""
_OUTSIDE = -1
"""In place of the number of a part of the backbone, for parameters that are not in it."""


def learning_rate_factor(optim: OptimConfig, step: int, epoch: int, total_steps: int) -> float:
    """What the base learning rates are multiplied by at this step."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "step":
        return float(0.1 ** sum(epoch >= drop for drop in optim.drop_epoch))
    if optim.schedule == "wsd":
        return min(1.0, max(0, total_steps - step) / (DECAY_SHARE * total_steps))
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    model: SMCADETR, optim: OptimConfig, device: torch.device, muon_dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """AdamW, or Muon and AdamW. AdamW's groups come first; each time the backbone's follow the rest's, the last part of it first.
    Groups that are not decayed follow those that are. Muon computes in `muon_dtype`, or in what is fast on the device."""
    if optim.backbone_lr == 0:
        model.backbone.requires_grad_(False)
    depth_of = _depths(model, layerwise=optim.backbone_lr_decay < 1)

    def groups(parameters: Iterable[Tensor], lr: float, backbone_lr: float, **more: Any) -> list[dict[str, Any]]:
        alike: defaultdict[int, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            alike[depth_of.get(id(parameter), _OUTSIDE)].append(parameter)
        rates = {d: lr if d == _OUTSIDE else backbone_lr * optim.backbone_lr_decay**d for d in sorted(alike)}
        return [{"params": alike[depth], "lr": rate, **more} for depth, rate in rates.items()]

    def adamw_groups(parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
        if optim.decayed == "all":
            return groups(parameters, optim.lr, optim.backbone_lr)
        weights = _weights_of_layers(model)
        decayed = groups((p for p in parameters if id(p) in weights), optim.lr, optim.backbone_lr)
        others = (p for p in parameters if id(p) not in weights)
        return decayed + groups(others, optim.lr, optim.backbone_lr, weight_decay=0.0)

    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type in ("cuda", "cpu")
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(adamw_groups(trained), weight_decay=optim.weight_decay, fused=fused)
    taken = matrices_of(model)
    matrices = groups(taken, optim.muon_lr, optim.muon_lr * optim.backbone_lr / optim.lr)
    ids = {id(p) for p in taken}
    others = adamw_groups([p for p in trained if id(p) not in ids])
    return Muon(others, matrices, muon_dtype or fast_dtype(device), weight_decay=optim.weight_decay, fused=fused)


def _depths(model: SMCADETR, *, layerwise: bool) -> dict[int, int]:
    """For the id of each trained parameter of the backbone: how many parts of it follow; 0 for all if they learn alike."""
    if not layerwise:
        return {id(p): 0 for p in model.backbone.parameters()}
    parts = reversed(model.backbone.parts().values())
    return {id(p): depth for depth, parameters in enumerate(parts) for p in parameters}


def _weights_of_layers(model: nn.Module) -> set[int]:
    """The ids of the weights of linear layers and convolutions."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    return {id(layer.weight) for layer in layers}


def set_learning_rates(optimizer: torch.optim.Optimizer, base_lrs: list[float], factor: float) -> None:
    """Learning rate of each parameter group ← its base rate times `factor`."""
    for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base * factor


@torch.no_grad()
def clip_gradient(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradient down to a norm of `max_norm`, and return the norm that it had.

    As torch's ``clip_grad_norm_``, except where that norm is NaN: there, torch multiplies every gradient by NaN, and nobody can
    say any more which of them it was. Here they stay as they are.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm.nan_to_num(nan=0.0, posinf=math.inf))
    return norm


def average_decay(decay: float, steps_before: int) -> float:
    """What the average keeps of itself at a step: less at first, so that it soon forgets the first weights."""
    return min(decay, (1 + steps_before) / (10 + steps_before))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 − decay)·model; whole numbers (batch counters) are copied."""
    states = average.state_dict().values(), model.state_dict().values()
    pairs = [(local(a), local(m)) for a, m in zip(*states, strict=True)]  # alike on every process
    floats: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        (floats if pair[0].is_floating_point() else others).append(pair)
    torch._foreach_lerp_([a for a, _ in floats], [m for _, m in floats], 1 - decay)
    for a, m in others:
        a.copy_(m)
