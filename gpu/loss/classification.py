"""Losses of class logits, of each one by itself (docs/method.md §5 and §8)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from smca.gpu.loss.matcher import FOCAL_ALPHA, FOCAL_GAMMA

MATCHABILITY_GAMMA = 1.5
MATCHABILITY_WEIGHT = 0.5


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA
) -> Tensor:
    """Focal loss (arXiv 1708.02002, eq. 5) of each logit against a 0/1 target, in the shape of both; α weighs the ones."""
    targets = targets.to(logits.dtype)
    p = logits.sigmoid()
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = p * (1 - targets) + (1 - p) * targets  # 1 − probability given to the truth
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * miss**gamma * cross_entropy


def matchability_loss(logits: Tensor, qualities: Tensor, matched: Tensor) -> Tensor:
    """Matchability-aware loss (DEIM, arXiv 2412.04234, eq. 3) of each logit, in the shape of all three.

    Args:
        logits: class logits.
        qualities: IoU of a matched pair at its class, else 0; without gradient.
        matched: bool, True at a matched pair's class.
    """
    goal = qualities**MATCHABILITY_GAMMA
    weight = (logits.detach().sigmoid() ** MATCHABILITY_GAMMA).masked_fill(matched, 1.0)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    return MATCHABILITY_WEIGHT * weight * cross_entropy
