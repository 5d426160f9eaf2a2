"""The set loss (docs/method.md §5) on padded targets: one matching per layer, focal + L1 + GIoU, summed over all layers.

Shape letters: M decoder layers, B images, N queries, K classes, T targets (padded).
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from smca.datasets import Targets
from smca.gpu.config import LossConfig
from smca.gpu.loss.boxes import cxcywh_to_xyxy, generalized_box_iou
from smca.gpu.loss.matcher import BROKEN, FOCAL_ALPHA, FOCAL_GAMMA, match


class SetCriterion(nn.Module):
    """Matches and scores the output of every decoder layer."""

    def __init__(self, config: LossConfig, *, matcher_backend: str = "auto") -> None:
        super().__init__()
        self.weights = config.weights
        self.matcher_backend = matcher_backend

    def forward(self, outputs: dict[str, Tensor], targets: Targets) -> dict[str, Tensor]:
        """Terms of the loss, already weighted.

        Args:
            outputs: "logits" [M, B, N, K], "boxes" [M, B, N, 4] cxcywh in 0–1.
            targets: labels [B, T], boxes [B, T, 4] cxcywh in 0–1, valid [B, T].

        Returns:
            "class/0", "l1/0", "giou/0", "class/1" … one scalar per term and layer, and "loss", their sum.
        """
        logits, boxes = outputs["logits"], outputs["boxes"]
        if logits.dtype != torch.float64:  # under autocast the network is bf16, the loss never
            logits, boxes = logits.float(), boxes.float()
        query = match(logits, boxes, targets, self.weights, backend=self.matcher_backend)  # [M, B, T]
        # A matching that is broken by NaN costs leaves its targets out; that layer's loss must not look healthy because of it.
        broken = torch.where((query == BROKEN).any(2).any(1), torch.nan, 0.0).to(logits.dtype)  # [M]
        matched = query >= 0
        query = query.clamp(min=0)
        num_boxes = _num_boxes(targets.valid).to(logits.dtype)

        true_labels = targets.labels.expand(len(logits), -1, -1)
        focal = sigmoid_focal_loss(logits, one_hot(query, true_labels, matched, logits.shape)).sum((1, 2, 3))

        pred = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))  # [M, B, T, 4]
        true = targets.boxes.to(boxes.dtype).expand_as(pred)
        true = true.masked_fill(~matched[..., None], 0.0)  # padding may hold anything
        l1 = ((pred - true).abs().sum(-1) * matched).sum((1, 2))
        giou = ((1 - generalized_box_iou(cxcywh_to_xyxy(pred), cxcywh_to_xyxy(true))) * matched).sum((1, 2))

        by_name = {"class": focal + broken, "l1": l1, "giou": giou}
        per_layer = {name: self.weights[name] * value / num_boxes for name, value in by_name.items()}
        terms = {f"{name}/{m}": value[m] for m in range(len(logits)) for name, value in per_layer.items()}
        terms["loss"] = torch.stack(list(per_layer.values())).sum()
        return terms


def one_hot(query: Tensor, labels: Tensor, matched: Tensor, shape: torch.Size) -> Tensor:
    """1 at (layer, image, query, class) of each matched pair, else 0: query, labels, matched [M, B, T] → [M, B, N, K]."""
    _, _, queries, classes = shape
    # Unmatched targets write into one spare column that is cut off again, so that shapes stay static.
    flat = torch.where(matched, query * classes + labels, queries * classes)
    target = torch.zeros(*shape[:2], queries * classes + 1, device=query.device)
    return target.scatter_(2, flat, 1.0)[..., :-1].reshape(shape)


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


def _num_boxes(valid: Tensor) -> Tensor:
    """Number of ground-truth boxes, averaged over all processes, at least 1."""
    count = valid.sum().float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count = count / distributed.get_world_size()
    return count.clamp(min=1.0)
