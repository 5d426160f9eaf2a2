"""Beyond the paper: what the encoder's cells are to say, and the loss of what they do say.

The set loss gives an object one query. Here it gets up to six cells, chosen by how well they do already, so that the
encoder is taught from its first step. For cell l with the anchor a_l, class logits x_l and the box b_l (`dense_head`),
and an object t of its image with the label k_t and the box b_t, all cxcywh in 0–1 of the unpadded image:

    (T1) near_lt   = |a_x − t_x| ≤ max(0.4·t_w, 0.75·a_w), the same in y, and l is unpadded
    (T2) metric_lt = near_lt · √σ(x_l,k_t) · (IoU(b_l, b_t) + 0.05)³
    (T3) chosen_lt = metric_lt is one of the 6 highest of t, and not 0                  of equals, any
    (T4) owner(l)  = of the t that chose l, the one with the highest IoU(b_l, b_t)      of equals, any
    (T5) z_lk      = clip( metric_lt / max over l' of metric_l't · max over chosen l' of IoU(b_l', b_t), 0.1, 1 )
                     where t = owner(l) and k = k_t, else 0
    (T6) class/cells = ½·w_class / boxes · Σ over unpadded l, k of v·( −z·ln p − (1 − z)·ln(1 − p) )
                     p = σ(x_lk),  v = 1 where z > 0, else ¾·p²
    (T7) l1/cells, giou/cells = w / (6·boxes) · Σ over owned l of ‖b_l − b_owner(l)‖₁, and of 1 − GIoU(b_l, b_owner(l))

boxes is (S1) of `losses`, of the whole step. (Not the number of owned cells, which is known only when all images of a
step have been seen: a step may take them in parts.) Assignment, goals and v are taken as given: no gradient passes
through them. Near (T1) lies within the object, but for objects so small that they would else have no cell. Sources:
TOOD, arXiv 2108.07755, sections 3.2 and 3.3, for (T2), (T3) and (T5); varifocal loss, arXiv 2008.13367, equation (2),
for v.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import BoolArray, FloatArray, IntArray, require_shape
from smca.reference.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from smca.reference.layers import sigmoid, softplus
from smca.reference.losses import PaddedTargets
from smca.reference.matching import check_weights

CELLS_PER_OBJECT = 6
NEAR_SIDE = 0.4
NEAR_CELL = 0.75
IOU_FLOOR = 0.05
LEAST_GOAL = 0.1
CLASS_WEIGHT = 0.5
NEGATIVE_WEIGHT = 0.75


class Assignment(NamedTuple):
    """What the cells are to say. Equations (T1) to (T5)."""

    owner: IntArray
    """[B, L], the object that owns a cell, −1 if none does."""
    goal: FloatArray
    """[B, L], z at the owner's class, 0 if there is none."""


def assign_cells(outputs: Mapping[str, npt.ArrayLike], targets: PaddedTargets) -> Assignment:
    """Which object owns which cell. Equations (T1) to (T5).

    Args:
        outputs: "cell_logits" [B, L, K], "cell_boxes" and "cell_anchors" [B, L, 4], "cell_padding" [B, L], as
            `model.forward` returns them, L cells of all levels.
        targets: of the batch; padding may hold anything.

    Raises:
        ValueError: shapes that don't fit.

    Three cells in a row and an object that covers the first two, whose centres are 0.17 off its own: it owns both. The
    first has found its box, the second nothing; the goal of a cell that does much worse than the best is 0.1.

    >>> anchors = np.array([[[1 / 6, 0.5, 1 / 3, 1.0], [0.5, 0.5, 1 / 3, 1.0], [5 / 6, 0.5, 1 / 3, 1.0]]])
    >>> boxes = np.array([[[1 / 3, 0.5, 2 / 3, 1.0], [0.9, 0.5, 0.1, 1.0], [0.9, 0.5, 0.1, 1.0]]])
    >>> outputs = {"cell_logits": np.zeros((1, 3, 1)), "cell_boxes": boxes, "cell_anchors": anchors}
    >>> outputs["cell_padding"] = np.zeros((1, 3), dtype=bool)
    >>> from smca.reference.losses import Targets
    >>> one = Targets(np.array([[0]]), np.array([[[1 / 3, 0.5, 2 / 3, 1.0]]]), np.array([[True]]))
    >>> owner, goal = assign_cells(outputs, one)
    >>> owner.tolist(), goal.round(4).tolist()
    ([[0, 0, -1]], [[1.0, 0.1, 0.0]])
    """
    logits, boxes, anchors, padding, labels, target_boxes, valid = _arrays(outputs, targets)
    batch, cells = padding.shape
    owner, goal = np.full((batch, cells), -1), np.zeros((batch, cells))
    for image in range(batch):
        (real,) = np.nonzero(valid[image])
        if not len(real):
            continue
        true = target_boxes[image, real]  # [t, 4]
        distance = np.abs(anchors[image, :, None, :2] - true[:, :2])  # [L, t, 2]
        reach = np.maximum(NEAR_SIDE * true[:, 2:], NEAR_CELL * anchors[image, :, None, 2:])
        near = (distance <= reach).all(axis=-1) & ~padding[image, :, None]  # (T1)
        iou = box_iou(cxcywh_to_xyxy(boxes[image])[:, None], cxcywh_to_xyxy(true))
        score = sigmoid(logits[image][:, labels[image, real]])  # [L, t]
        metric = near * np.sqrt(score) * (iou + IOU_FLOOR) ** 3  # (T2)

        best = np.argsort(-metric, axis=0, kind="stable")[:CELLS_PER_OBJECT]
        chosen = np.zeros(metric.shape, dtype=bool)
        np.put_along_axis(chosen, best, True, axis=0)
        chosen &= metric > 0  # (T3)
        owned = chosen.any(axis=1)
        column = np.argmax(np.where(chosen, iou, -1.0), axis=1)  # (T4)
        # An object without a chosen cell owns none, and its quotient is not asked for.
        relative = metric / np.maximum(metric.max(axis=0), np.finfo(np.float64).tiny)
        quality = np.clip(relative * np.where(chosen, iou, 0.0).max(axis=0), LEAST_GOAL, 1.0)
        owner[image] = np.where(owned, real[column], -1)
        goal[image] = np.where(owned, quality[np.arange(cells), column], 0.0)  # (T5)
    return Assignment(owner, goal)


def dense_loss(
    outputs: Mapping[str, npt.ArrayLike], targets: PaddedTargets, weights: Mapping[str, float]
) -> dict[str, float]:
    """The loss of the cells. Equations (T1) to (T7).

    Args:
        outputs: as in `assign_cells`.
        targets: of the batch; images without objects and T = 0 are legal.
        weights: "class", "l1" and "giou", as in `losses`.

    Returns:
        "class/cells", "l1/cells" and "giou/cells", each with its weight in it.

    Raises:
        ValueError: shapes that don't fit, or other weights.

    Without an object, a cell at p = ½ pays ½·2·¾·(½)²·ln 2 for its doubt:

    >>> outputs = {"cell_logits": np.zeros((1, 1, 1)), "cell_boxes": np.full((1, 1, 4), 0.5)}
    >>> outputs |= {"cell_anchors": np.array([[[0.5, 0.5, 1.0, 1.0]]]), "cell_padding": np.array([[False]])}
    >>> from smca.reference.losses import Targets
    >>> none = Targets(np.zeros((1, 0), dtype=int), np.zeros((1, 0, 4)), np.zeros((1, 0), dtype=bool))
    >>> round(dense_loss(outputs, none, {"class": 2.0, "l1": 5.0, "giou": 2.0})["class/cells"], 4)
    0.13
    """
    check_weights(weights)
    logits, boxes, _, padding, labels, target_boxes, valid = _arrays(outputs, targets)
    owner, goal = assign_cells(outputs, targets)
    image, cell = np.nonzero(owner >= 0)
    target = owner[image, cell]
    z = np.zeros(logits.shape)
    z[image, cell, labels[image, target]] = goal[image, cell]
    v = np.where(z > 0, 1.0, NEGATIVE_WEIGHT * sigmoid(logits) ** 2) * ~padding[..., None]
    class_sum = (v * (z * softplus(-logits) + (1 - z) * softplus(logits))).sum()  # (T6)
    found, wanted = boxes[image, cell], target_boxes[image, target]
    giou = generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
    num_boxes = max(1, int(valid.sum()))
    num_cells = CELLS_PER_OBJECT * num_boxes
    return {
        "class/cells": float(CLASS_WEIGHT * weights["class"] * class_sum / num_boxes),
        "l1/cells": float(weights["l1"] * np.abs(found - wanted).sum() / num_cells),  # (T7)
        "giou/cells": float(weights["giou"] * (1.0 - giou).sum() / num_cells),
    }


def _arrays(
    outputs: Mapping[str, npt.ArrayLike], targets: PaddedTargets
) -> tuple[FloatArray, FloatArray, FloatArray, BoolArray, IntArray, FloatArray, BoolArray]:
    """Convert and check: the four of outputs, labels, target boxes, valid."""
    logits, boxes, anchors = (
        np.asarray(outputs[f"cell_{name}"], dtype=np.float64) for name in ("logits", "boxes", "anchors")
    )
    padding = np.asarray(outputs["cell_padding"], dtype=np.bool_)
    require_shape("outputs['cell_logits']", logits, (None, None, None), "Give [B, L, K], the cells of all levels.")
    for name, array in (("boxes", boxes), ("anchors", anchors)):
        require_shape(f"outputs['cell_{name}']", array, (*logits.shape[:2], 4), "Give one box per cell.")
    require_shape(
        "outputs['cell_padding']", padding, tuple(logits.shape[:2]), "Say of each cell whether it is padding."
    )
    labels, valid = np.asarray(targets.labels, dtype=np.int64), np.asarray(targets.valid, dtype=np.bool_)
    target_boxes = np.asarray(targets.boxes, dtype=np.float64)
    require_shape("targets.valid", valid, (logits.shape[0], None), "Give [B, T], as many images as the outputs have.")
    require_shape("targets.boxes", target_boxes, (*valid.shape, 4), "Pad boxes as valid is padded: [B, T, 4].")
    return logits, boxes, anchors, padding, labels, target_boxes, valid
