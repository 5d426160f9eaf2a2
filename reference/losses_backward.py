"""The set loss, backward: its gradient with respect to scores and boxes, written out.

A bar marks the gradient of the loss (S7) with respect to a quantity. The matching is taken as given: π(t) stays where it
is while scores and boxes move a little. Of the two halves of the focal loss (`matching` (A1)), with p = σ(x):

    (G1) positive'(x) = −α·(1 − p)^γ·( γ·p·(−ln p) + (1 − p) )
         negative'(x) = (1 − α)·p^γ·( γ·(1 − p)·(−ln(1 − p)) + p )
    (G2) x̄_nk = w_class / boxes · ( z_nk·positive'(x_nk) + (1 − z_nk)·negative'(x_nk) )                from (S4)

for classification="matchability", with v and z of (S8) and (S9), which are taken as given,

    (G3) x̄_nk = w_class / boxes · ½·v_nk·( p_nk − z_nk )                                              from (S9)

and for "softmax", whose scores are the z of K + 1 columns, with the target column k(n) and its weight ω_n of (K4) and (K5),

    (G4) z̄_nk = w_class · ω_n·( softmax(z_n)_k − [k = k(n)] ) / Σ_n ω_n                               from (K6)

Of a matched pair of boxes, predicted b and wanted t, with the overlap of areas I = |b ∩ t|, union U and hull H:

    (G5) b̄ = w_l1 / boxes · sign(b − t)                                       from (S5), in cxcywh; sign(0) = 0
    (G6) −GIoU' = −I'/U + U'·( I/U² − 1/H ) + H'·U/H²                         from (B3) = I/U − 1 + U/H
    (G7) U' = (area of b)' − I'
    (G8) c̄ = l̄ + r̄,  w̄ = ½·(r̄ − l̄)      corners l = c − w/2, r = c + w/2      from (B1), per axis

and w_giou / boxes times (G6) joins (G5). On each axis a corner of b moves the overlap's side where it is the one that
bounds it, and the hull's side where that one does; where the corners of b and t coincide, half of either. Areas that are
0, and with them their ratios, stay 0: no gradient. Queries without an object have a gradient of their scores alone, and an
image without objects of no box.

Sources: method.md §5; focal loss, arXiv 1708.02002, equation (5); GIoU, arXiv 1902.09630.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, IntArray
from smca.reference.boxes import box_iou, cxcywh_to_xyxy
from smca.reference.layers import sigmoid, softmax, softplus
from smca.reference.losses import MATCHABILITY_GAMMA, MATCHABILITY_WEIGHT, PaddedTargets, match
from smca.reference.matching import FOCAL_ALPHA, FOCAL_GAMMA, check_classification, check_weights
from smca.reference.softmax_scores import NO_OBJECT_WEIGHT, class_logits_of


def focal_terms_backward(
    logits: FloatArray, alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA
) -> tuple[FloatArray, FloatArray]:
    """The derivatives of `matching.focal_terms`, (positive, negative). Equation (G1).

    Args:
        logits: any shape. Of any size: nothing overflows.
        alpha: weight of presence, in [0, 1]; absence has 1 − alpha.
        gamma: how much less an easy example counts, ≥ 0.

    Returns:
        Two arrays of the same shape: ≤ 0 where the class is present, ≥ 0 where it is absent.

    At p = ½: −¼·¼·(ln 2 + ½) and ¾·¼·(ln 2 + ½).

    >>> positive, negative = focal_terms_backward(np.array([0.0]))
    >>> positive.round(4).tolist(), negative.round(4).tolist()
    ([-0.0746], [0.2237])
    """
    p, not_p = sigmoid(logits), sigmoid(-logits)
    positive = -alpha * not_p**gamma * (gamma * p * softplus(-logits) + not_p)
    negative = (1.0 - alpha) * p**gamma * (gamma * not_p * softplus(logits) + p)
    return positive, negative


def giou_loss_backward(boxes_cxcywh: FloatArray, target_boxes_cxcywh: FloatArray) -> FloatArray:
    """The gradient of 1 − GIoU with respect to the first box, pair by pair. Equations (G6) to (G8).

    Args:
        boxes_cxcywh: [P, 4], predicted.
        target_boxes_cxcywh: [P, 4], wanted, in the same unit.

    Returns:
        [P, 4], per unit of centre x, centre y, width and height.

    A unit square half a unit to the right of the one that is wanted shares ½ of 1½ with it, and the hull has no gap.
    Moved further right, the overlap I shrinks at a rate of 1, and union and hull grow at 1: 1/1½ + (½/1½² − 1/1½) + 1½/1½²
    = 0.8889. Made wider, it grows by half of that on either side: I, U and H all grow at ½, and the loss falls, −½/1½ +
    ½·(½/1½² − 1/1½) + ½·1½/1½² = −0.2222. The heights coincide:

    >>> giou_loss_backward(np.array([[1.0, 0.5, 1.0, 1.0]]), np.array([[0.5, 0.5, 1.0, 1.0]])).round(4).tolist()
    [[0.8889, 0.0, -0.2222, 0.0]]
    """
    ours, wanted = cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(target_boxes_cxcywh)
    (low, high), (low_t, high_t) = (np.split(corners, 2, axis=-1) for corners in (ours, wanted))  # [P, 2] each
    overlap_wh = np.maximum(np.minimum(high, high_t) - np.maximum(low, low_t), 0.0)
    size_wh, hull_wh = high - low, np.maximum(high, high_t) - np.minimum(low, low_t)
    overlap, hull = np.prod(overlap_wh, axis=-1), np.prod(hull_wh, axis=-1)
    union = np.prod(size_wh, axis=-1) + np.prod(high_t - low_t, axis=-1) - overlap

    # By how much each of our corners moves the sides, [P, 4]: (low x, low y, high x, high y).
    meet = np.tile(overlap_wh > 0, 2)
    overlap_side = np.concatenate([-_share(low - low_t), _share(high_t - high)], axis=-1) * meet
    hull_side = np.concatenate([-_share(low_t - low), _share(high - high_t)], axis=-1)
    size_side = np.concatenate([-np.ones_like(low), np.ones_like(high)], axis=-1)
    d_overlap, d_size, d_hull = (
        side * np.tile(wh[..., ::-1], 2)
        for side, wh in ((overlap_side, overlap_wh), (size_side, size_wh), (hull_side, hull_wh))
    )
    d_union = d_size - d_overlap  # (G7)
    per_union, per_hull = _inverse(union)[:, None], _inverse(hull)[:, None]
    shrinks = overlap[:, None] * per_union**2 - per_hull
    d_corners = -d_overlap * per_union + d_union * shrinks + d_hull * union[:, None] * per_hull**2  # (G6)
    d_low, d_high = np.split(d_corners, 2, axis=-1)
    return np.concatenate([d_low + d_high, (d_high - d_low) / 2], axis=-1)  # (G8)


def _share(difference: FloatArray) -> FloatArray:
    """How much of max(x, y) moves with x, for x − y: all, nothing, or half."""
    share: FloatArray = (1.0 + np.sign(difference)) / 2
    return share


def _inverse(area: FloatArray) -> FloatArray:
    """1/area; 0 for an area of 0."""
    return np.where(area > 0, 1.0, 0.0) / np.where(area > 0, area, 1.0)


def set_loss_backward(
    outputs: Mapping[str, npt.ArrayLike],
    targets: PaddedTargets,
    weights: Mapping[str, float],
    classification: str = "focal",
    no_object_weight: float = NO_OBJECT_WEIGHT,
    num_boxes: float | None = None,
) -> dict[str, FloatArray]:
    """The gradient of `set_loss` with respect to the outputs that it reads. Equations (G1) to (G8).

    Args:
        outputs, targets, weights, classification, no_object_weight, num_boxes: as given to `losses.set_loss`.

    Returns:
        "boxes" [M, B, N, 4], per unit of cxcywh, and "logits" [M, B, N, K], or for "softmax" "class_logits" [M, B, N, K + 1].

    Raises:
        ValueError: as `set_loss`.

    The example of `set_loss`, where a query whose box is off by a quarter in x is alone, and so is matched. At p = ½ its
    score is to rise, 2·(−0.0746). Its centre is to go left, 5·sign of L1 and 2·1.7778 of GIoU, and GIoU has it widen:

    >>> from smca.reference.losses import Targets
    >>> outputs = {"logits": np.zeros((1, 1, 1, 1)), "boxes": np.array([0.75, 0.5, 0.5, 0.5]).reshape(1, 1, 1, 4)}
    >>> one = Targets(np.array([[0]]), np.array([[[0.5, 0.5, 0.5, 0.5]]]), np.array([[True]]))
    >>> gradient = set_loss_backward(outputs, one, {"class": 2.0, "l1": 5.0, "giou": 2.0})
    >>> gradient["logits"].ravel().round(4).tolist(), gradient["boxes"].ravel().round(4).tolist()
    ([-0.1491], [8.5556, 0.0, -0.8889, 0.0])
    """
    check_weights(weights)
    check_classification(classification)
    logits, boxes = (np.asarray(outputs[name], dtype=np.float64) for name in ("logits", "boxes"))
    labels, target_boxes = np.asarray(targets.labels), np.asarray(targets.boxes, dtype=np.float64)
    query_of_target = match(logits, boxes, targets, weights, classification)
    if num_boxes is None:
        num_boxes = max(1, int(np.asarray(targets.valid).sum()))  # (S1)
    scores = class_logits_of(outputs, logits) if classification == "softmax" else logits
    d_scores, d_boxes = np.zeros(scores.shape), np.zeros(boxes.shape)
    for layer in range(logits.shape[0]):
        image, target = np.nonzero(query_of_target[layer] >= 0)  # one entry per matched pair
        pairs = image, query_of_target[layer, image, target]
        wanted, predicted = target_boxes[image, target], boxes[layer][pairs]  # [P, 4] each
        of_l1 = weights["l1"] * np.sign(predicted - wanted)  # (G5)
        of_giou = weights["giou"] * giou_loss_backward(predicted, wanted)
        d_boxes[layer][pairs] = (of_l1 + of_giou) / num_boxes
        matched = (*pairs, labels[image, target])
        if classification == "softmax":
            d_scores[layer] = weights["class"] * _softmax_loss_backward(scores[layer], matched, no_object_weight)
            continue
        if classification == "focal":
            positive, negative = focal_terms_backward(scores[layer])
            of_class = negative
            of_class[matched] = positive[matched]
        else:
            quality = box_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
            of_class = _matchability_loss_backward(scores[layer], matched, quality)
        d_scores[layer] = weights["class"] * of_class / num_boxes  # (G2), (G3)
    return {"class_logits" if classification == "softmax" else "logits": d_scores, "boxes": d_boxes}


def _matchability_loss_backward(
    logits: FloatArray, matched: tuple[IntArray, IntArray, IntArray], quality: FloatArray
) -> FloatArray:
    """The bracket of (G3), with its ½·v: [B, N, K], for matched (image, query, class) of an IoU of `quality`, [P] each."""
    p = sigmoid(logits)
    v, z = p**MATCHABILITY_GAMMA, np.zeros(logits.shape)
    v[matched], z[matched] = 1.0, quality**MATCHABILITY_GAMMA
    gradient: FloatArray = MATCHABILITY_WEIGHT * v * (p - z)
    return gradient


def _softmax_loss_backward(
    z: FloatArray, matched: tuple[IntArray, IntArray, IntArray], no_object_weight: float
) -> FloatArray:
    """(G4) without w_class: [B, N, K + 1]."""
    image, query, label = matched
    column, weight = np.full(z.shape[:-1], z.shape[-1] - 1), np.full(z.shape[:-1], no_object_weight)  # [B, N]
    column[image, query], weight[image, query] = label, 1.0
    wanted = np.arange(z.shape[-1]) == column[..., None]
    gradient: FloatArray = weight[..., None] * (softmax(z) - wanted) / weight.sum()
    return gradient
