"""What the cells of a dense head are to say, and their loss (docs/method.md §8; equations (T1) to (T7) of
``smca.reference.dense_loss``). Shapes are static: no step waits for a GPU.

Shape letters: B images, L cells of all levels, K classes, T targets (padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from smca.datasets import Targets
from smca.gpu.loss.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from smca.gpu.loss.count import boxes_per_process
from smca.gpu.loss.precision import in_float32

CELLS_PER_OBJECT = 6
NEAR_SIDE = 0.4
NEAR_CELL = 0.75
IOU_FLOOR = 0.05
LEAST_GOAL = 0.1
CLASS_WEIGHT = 0.5
NEGATIVE_WEIGHT = 0.75


class Assignment(NamedTuple):
    """What the cells are to say."""

    owner: Tensor
    """[B, L] int64, the target that owns a cell, −1 if none does."""
    goal: Tensor
    """[B, L] what the score of the owner's class is to be, 0 if there is none."""


@torch.no_grad()
def assign_cells(outputs: Mapping[str, Tensor], targets: Targets) -> Assignment:
    """Give each target the cells near its centre that do best at it: of equally good ones, any.

    Args:
        outputs: "cell_logits" [B, L, K], "cell_boxes" and "cell_anchors" [B, L, 4] cxcywh in 0–1, "cell_padding" [B, L] bool.
        targets: labels [B, T], boxes [B, T, 4] cxcywh in 0–1, valid [B, T]; padding may hold anything.
    """
    logits, boxes, anchors = (in_float32(outputs[f"cell_{name}"]) for name in ("logits", "boxes", "anchors"))
    padding = outputs["cell_padding"]
    cells = logits.shape[1]
    real = targets.valid[:, None]  # [B, 1, T]
    true = targets.boxes.to(boxes.dtype).masked_fill(~targets.valid[..., None], 0.0)[:, None]  # [B, 1, T, 4]
    distance = (anchors[:, :, None, :2] - true[..., :2]).abs()  # [B, L, T, 2]
    reach = torch.maximum(NEAR_SIDE * true[..., 2:], NEAR_CELL * anchors[:, :, None, 2:])
    near = (distance <= reach).all(-1) & real & ~padding[..., None]
    iou = box_iou(cxcywh_to_xyxy(boxes)[:, :, None], cxcywh_to_xyxy(true))  # [B, L, T]
    labels = targets.labels.masked_fill(~targets.valid, 0)
    score = logits.gather(2, labels[:, None].expand(-1, cells, -1)).sigmoid()
    metric = near * score.sqrt() * (iou + IOU_FLOOR) ** 3

    index = metric.topk(min(CELLS_PER_OBJECT, cells), dim=1).indices
    chosen = torch.zeros_like(near).scatter_(1, index, True) & (metric > 0)
    owned, owner = chosen.any(2), torch.where(chosen, iou, -1.0).argmax(2)
    tiny = torch.finfo(metric.dtype).tiny
    relative = metric / metric.amax(1, keepdim=True).clamp(min=tiny)
    quality = (relative * (iou * chosen).amax(1, keepdim=True)).clamp(min=LEAST_GOAL, max=1.0)
    goal = quality.gather(2, owner[..., None])[..., 0]
    return Assignment(torch.where(owned, owner, -1), torch.where(owned, goal, 0.0))


def dense_loss(
    outputs: Mapping[str, Tensor], targets: Targets, weights: Mapping[str, float], *, num_boxes: Tensor | None = None
) -> dict[str, Tensor]:
    """The loss of the cells.

    Args:
        outputs: as in ``assign_cells``.
        targets: labels [B, T], boxes [B, T, 4] cxcywh in 0–1, valid [B, T].
        weights: of the terms "class", "l1" and "giou".
        num_boxes: as of ``SetCriterion``.

    Returns:
        "class/cells", "l1/cells", "giou/cells": scalars, weighted.
    """
    logits, boxes, padding = (
        in_float32(outputs["cell_logits"]),
        in_float32(outputs["cell_boxes"]),
        outputs["cell_padding"],
    )
    owner, goal = assign_cells(outputs, targets)
    positive, owner = owner >= 0, owner.clamp(min=0)
    label = targets.labels.gather(1, owner)  # a cell that nobody owns has a goal of 0 at any class
    z = torch.zeros_like(logits).scatter_(2, label[..., None], goal[..., None])
    v = (NEGATIVE_WEIGHT * logits.detach().sigmoid() ** 2).masked_fill(z > 0, 1.0).masked_fill(padding[..., None], 0.0)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, z, reduction="none")

    true = targets.boxes.to(boxes.dtype).gather(1, owner[..., None].expand(-1, -1, 4))
    true = true.masked_fill(~positive[..., None], 0.0)
    giou = 1 - generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(true))
    if num_boxes is None:
        num_boxes = boxes_per_process(targets.valid.sum())
    num_boxes = num_boxes.to(logits.dtype)
    num_cells = CELLS_PER_OBJECT * num_boxes
    return {
        "class/cells": CLASS_WEIGHT * weights["class"] * (v * cross_entropy).sum() / num_boxes,
        "l1/cells": weights["l1"] * ((boxes - true).abs().sum(-1) * positive).sum() / num_cells,
        "giou/cells": weights["giou"] * (giou * positive).sum() / num_cells,
    }
