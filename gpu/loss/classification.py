"""Losses of classes (docs/method.md §5 and §8): of each logit by itself, or of a query's softmax."""

from __future__ import annotations

import torch
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


def mean_cross_entropy(z: Tensor, query: Tensor, labels: Tensor, no_object_weight: float) -> Tensor:
    """DETR's weighted cross-entropy over classes and "no object" (equations (K4) to (K6) of ``smca.reference.softmax_scores``).

    Args:
        z: [M, B, N, K + 1] outputs of the class head, the last one for "no object".
        query: [M, B, T] of each target, below 0 where it has none.
        labels: [B, T], in the padding anything.
        no_object_weight: of a query without an object.

    Returns:
        [M], the mean over the queries of all images, each with its weight.
    """
    layers, batch, queries, columns = z.shape
    # Targets without a query write into one spare column that is cut off again, so that shapes stay static.
    place = torch.where(query >= 0, query, queries)
    wanted = torch.full((layers, batch, queries + 1), columns - 1, device=z.device)
    wanted = wanted.scatter_(2, place, labels.expand(layers, -1, -1))[..., :-1]
    weight = torch.ones_like(z[..., 0]).masked_fill(wanted == columns - 1, no_object_weight)
    cross_entropy = -z.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    return (weight * cross_entropy).sum((1, 2)) / weight.sum((1, 2))
