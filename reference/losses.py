"""The set loss: classes, L1 and GIoU, over the matched pairs, at every decoder layer.

For the outputs of one decoder layer, with π(t) the query matched to object t of its image (`matching`), x the class
logits and b the boxes (method.md §5; DETR, "Object detection set prediction loss"):

    (S1) boxes     = max(1, number of objects in the batch)                   averaged over processes when training
    (S2) z_nk      = 1 where query n is matched to an object of class k, else 0
    (S3) focal     = z·positive(x) + (1 − z)·negative(x)                      positive, negative: matching (A1)
    (S4) class/l   = w_class / boxes · Σ over images, queries n, classes k of focal(x_nk, z_nk)
    (S5) l1/l      = w_l1 / boxes · Σ over images, matched t of ‖b_π(t) − b_t‖₁
    (S6) giou/l    = w_giou / boxes · Σ over images, matched t of ( 1 − GIoU(b_π(t), b_t) )
    (S7) loss      = Σ over layers l of class/l + l1/l + giou/l

Beyond the paper, the class term can ask of a matched query that its score be the quality of its box, so that the best
box of several comes first (classification="matchability"; DEIM, arXiv 2412.04234, section 3.2, equation (3)):

    (S8) z_nk      = IoU(b_n, b_t)^1.5 where query n is matched to object t of class k, else 0          taken as given
    (S9) in place of (S3): ½·v·( −z·ln p − (1 − z)·ln(1 − p) ),   v = 1 where matched, else p^1.5       v taken as given

with p = σ(x). The ½ leaves w_class = 2 with the weight of 1 that its authors give it.

DETR's own class term, for a model that scores by a softmax, takes the place of (S4) with classification="softmax":
`softmax_scores`, equations (K4) to (K6).

Each layer is matched by itself. The sum in (S4) runs over all queries, matched or not: it is how a query learns that it
sees no object. There is no class for "no object"; every sigmoid says no. An image without objects takes part in (S4)
only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import BoolArray, FloatArray, IntArray, require_shape
from smca.reference.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from smca.reference.layers import sigmoid, softplus
from smca.reference.matching import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    check_classification,
    check_weights,
    focal_terms,
    linear_sum_assignment,
    match_cost,
)
from smca.reference.softmax_scores import NO_OBJECT_WEIGHT, class_logits_of, softmax_loss

MATCHABILITY_GAMMA = 1.5
MATCHABILITY_WEIGHT = 0.5


class PaddedTargets(Protocol):
    """The objects of a batch, padded to the most that an image has. What stands in the padding is never read.

    Any object with these attributes will do; each is converted with `np.asarray`.
    """

    @property
    def labels(self) -> npt.ArrayLike:
        """[B, T], integers in [0, K)."""
        ...

    @property
    def boxes(self) -> npt.ArrayLike:
        """[B, T, 4], cxcywh in [0, 1] of the unpadded image."""
        ...

    @property
    def valid(self) -> npt.ArrayLike:
        """[B, T], bool, True where there is an object."""
        ...


@dataclass(frozen=True)
class Targets:
    """`PaddedTargets` in NumPy arrays: labels [B, T], boxes [B, T, 4] (cxcywh, 0 to 1), valid [B, T]."""

    labels: IntArray
    boxes: FloatArray
    valid: BoolArray


def sigmoid_focal_loss(
    logits: FloatArray, targets: FloatArray, alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA
) -> FloatArray:
    """The focal loss of every logit, not reduced. Equation (S3); arXiv 1708.02002, equation (5).

    Args:
        logits: any shape. Of any size: nothing overflows.
        targets: the same shape, 1 where the class is present and 0 where it is not.
        alpha: weight of presence, in [0, 1]; absence has 1 − alpha.
        gamma: how much less an easy example counts, ≥ 0.

    Returns:
        The same shape, ≥ 0.

    Raises:
        ValueError: another shape of targets, or a target other than 0 and 1.

    >>> sigmoid_focal_loss(np.array([0.0, 0.0, -800.0]), np.array([1.0, 0.0, 1.0])).round(4).tolist()
    [0.0433, 0.13, 200.0]
    """
    require_shape("targets", targets, tuple(logits.shape), "Give one target per logit.")
    if not np.all((targets == 0) | (targets == 1)):
        raise ValueError("targets: expected 0 or 1 each, got another value. Give a one-hot array, not labels.")
    positive, negative = focal_terms(logits, alpha, gamma)
    return np.where(targets == 1, positive, negative)


def matchability_loss(logits: FloatArray, qualities: FloatArray, matched: BoolArray) -> FloatArray:
    """The matchability-aware loss of every logit, not reduced. Equations (S8) and (S9).

    Args:
        logits: any shape. Of any size: nothing overflows.
        qualities: the same shape, the IoU of a matched pair at its class, in [0, 1], else 0.
        matched: the same shape, True at a matched pair's class.

    Returns:
        The same shape, ≥ 0.

    Doubt (p = ½) about a perfect box costs ½·ln 2, about nothing ½·(½)^1.5·ln 2. About a box that missed, ½·ln 2: it
    should have scored 0.

    >>> logits, matched = np.zeros(3), np.array([True, False, True])
    >>> matchability_loss(logits, np.array([1.0, 0.0, 0.0]), matched).round(4).tolist()
    [0.3466, 0.1225, 0.3466]
    """
    z = qualities**MATCHABILITY_GAMMA  # (S8)
    weight = np.where(matched, 1.0, sigmoid(logits) ** MATCHABILITY_GAMMA)
    return MATCHABILITY_WEIGHT * weight * (z * softplus(-logits) + (1.0 - z) * softplus(logits))  # (S9)


def match(
    logits: npt.ArrayLike,
    boxes: npt.ArrayLike,
    targets: PaddedTargets,
    weights: Mapping[str, float],
    classification: str = "focal",
) -> IntArray:
    """The query of every object, for every decoder layer and image by itself. Matching (A3); method.md §5.

    Args:
        logits: [M, B, N, K], as `model.forward` returns them.
        boxes: [M, B, N, 4], cxcywh in [0, 1], likewise.
        targets: of the batch.
        weights: "class", "l1" and "giou", of the match cost.
        classification: of the loss, as `match_cost` takes it.

    Returns:
        [M, B, T], in [0, N), or −1 where the target is padding, or where an image with more objects than queries left
        it without one.

    Raises:
        ValueError: shapes that don't fit, a label outside [0, K), predictions that aren't finite, wrong weights.
    """
    logits, boxes, labels, target_boxes, valid = _arrays(logits, boxes, targets)
    layers, batch = logits.shape[:2]
    query_of_target = np.full((layers, batch, labels.shape[1]), -1)
    for layer in range(layers):
        for image in range(batch):
            (real,) = np.nonzero(valid[image])
            cost = match_cost(
                logits[layer, image],
                boxes[layer, image],
                labels[image, real],
                target_boxes[image, real],
                weights,
                classification,
            )
            queries, columns = linear_sum_assignment(cost)
            query_of_target[layer, image, real[columns]] = queries
    return query_of_target


def set_loss(
    outputs: Mapping[str, npt.ArrayLike],
    targets: PaddedTargets,
    weights: Mapping[str, float],
    classification: str = "focal",
    no_object_weight: float = NO_OBJECT_WEIGHT,
    num_boxes: float | None = None,
) -> dict[str, float]:
    """The whole loss. Equations (S1) to (S9), and `softmax_scores` (K4) to (K6); method.md §5.

    Args:
        outputs: "logits" [M, B, N, K] and "boxes" [M, B, N, 4] (cxcywh in [0, 1]), as `model.forward` returns; for
            classification="softmax" also "class_logits" [M, B, N, K + 1], which a model with class_scores="softmax" has.
        targets: of the batch; images without objects and T = 0 are legal.
        weights: "class", "l1" and "giou", both of the match cost and of the loss.
        classification: "focal"; "matchability", (S8) and (S9); or "softmax", (K4) to (K6).
        no_object_weight: of a query without an object, for "softmax".
        num_boxes: what (S4) to (S6) are divided by, where these are some images of a larger step; None = (S1).

    Returns:
        "class/0", "l1/0", "giou/0", "class/1", … by decoder layer, each with its weight in it, and "loss", their sum.

    Raises:
        ValueError: as `match`; for "softmax", outputs without "class_logits".

    One layer, one image, two queries, one class, one object; all logits 0. The second query's box is the object's own
    and the first one's is off by a quarter in x (the example of `match_cost`), so the second is matched. Focal: 0.0433
    for the matched query, 0.1300 for the other, times 2. L1 and GIoU: nothing left to pay.

    >>> boxes = np.array([[0.75, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    >>> outputs = {"logits": np.zeros((1, 1, 2, 1)), "boxes": boxes.reshape(1, 1, 2, 4)}
    >>> one = Targets(np.array([[0]]), np.array([[[0.5, 0.5, 0.5, 0.5]]]), np.array([[True]]))
    >>> weights = {"class": 2.0, "l1": 5.0, "giou": 2.0}
    >>> match(outputs["logits"], outputs["boxes"], one, weights).tolist()
    [[[1]]]
    >>> {name: round(value, 4) for name, value in set_loss(outputs, one, weights).items()}
    {'class/0': 0.3466, 'l1/0': 0.0, 'giou/0': 0.0, 'loss': 0.3466}

    With no object at all, both queries pay 0.1300 for their doubt:

    >>> none = Targets(np.zeros((1, 0), dtype=int), np.zeros((1, 0, 4)), np.zeros((1, 0), dtype=bool))
    >>> round(set_loss(outputs, none, weights)["loss"], 4)
    0.5199
    """
    check_weights(weights)
    logits, boxes, labels, target_boxes, valid = _arrays(outputs["logits"], outputs["boxes"], targets)
    query_of_target = match(logits, boxes, targets, weights, classification)
    if num_boxes is None:
        num_boxes = max(1, int(valid.sum()))  # (S1)
    z = class_logits_of(outputs, logits) if classification == "softmax" else logits

    terms: dict[str, float] = {}
    for layer in range(logits.shape[0]):
        image, target = np.nonzero(query_of_target[layer] >= 0)  # one entry per matched pair
        pairs = image, query_of_target[layer, image, target]
        wanted = labels[image, target], target_boxes[image, target]
        sums = loss_of_pairs(logits[layer], boxes[layer], pairs, *wanted, classification)
        if classification == "softmax":
            mean = softmax_loss(z[layer], pairs, wanted[0], no_object_weight)
            terms[f"class/{layer}"] = weights["class"] * mean
        terms |= {f"{term}/{layer}": float(weights[term] * total / num_boxes) for term, total in sums.items()}
    return {**terms, "loss": sum(terms.values())}  # (S7)


def loss_of_pairs(
    logits: FloatArray,
    boxes: FloatArray,
    pairs: tuple[IntArray, IntArray],
    labels: IntArray,
    target_boxes: FloatArray,
    classification: str = "focal",
) -> dict[str, float]:
    """The sums of (S4) to (S6), without weight and divisor, for one layer and a given matching.

    Args:
        logits: [B, N, K].
        boxes: [B, N, 4], cxcywh in [0, 1].
        pairs: image and query of each matched pair, [P] each.
        labels, target_boxes: of its object, [P] and [P, 4].
        classification: as in `set_loss`; with "softmax" without "class", which is no sum (`softmax_loss`).

    Raises:
        ValueError: another classification.
    """
    check_classification(classification)
    predicted, wanted = cxcywh_to_xyxy(boxes[pairs]), cxcywh_to_xyxy(target_boxes)  # [P, 4] each
    of_boxes = {
        "l1": float(np.abs(boxes[pairs] - target_boxes).sum()),  # (S5)
        "giou": float((1.0 - generalized_box_iou(predicted, wanted)).sum()),  # (S6)
    }
    if classification == "softmax":
        return of_boxes
    present = np.zeros(logits.shape)
    present[(*pairs, labels)] = 1.0  # (S2)
    if classification == "focal":
        per_logit = sigmoid_focal_loss(logits, present)
    else:
        quality = np.zeros(logits.shape)
        quality[(*pairs, labels)] = box_iou(predicted, wanted)
        per_logit = matchability_loss(logits, quality, present == 1)
    return {"class": float(per_logit.sum()), **of_boxes}  # (S4)


def _arrays(
    logits: npt.ArrayLike, boxes: npt.ArrayLike, targets: PaddedTargets
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray, BoolArray]:
    """Convert and check: logits, boxes, labels, target boxes, valid."""
    logits = np.asarray(logits, dtype=np.float64)
    boxes = np.asarray(boxes, dtype=np.float64)
    labels = np.asarray(targets.labels, dtype=np.int64)
    target_boxes = np.asarray(targets.boxes, dtype=np.float64)
    valid = np.asarray(targets.valid, dtype=np.bool_)
    require_shape("logits", logits, (None, None, None, None), "Give [M, B, N, K], all layers and images.")
    layers, batch, queries, _ = logits.shape
    require_shape("boxes", boxes, (layers, batch, queries, 4), "Give one box for every query in logits.")
    require_shape("targets.valid", valid, (batch, None), "Give [B, T], as many images as the outputs have.")
    require_shape("targets.labels", labels, tuple(valid.shape), "Pad labels as valid is padded: [B, T].")
    require_shape("targets.boxes", target_boxes, (*valid.shape, 4), "Pad boxes as valid is padded: [B, T, 4].")
    return logits, boxes, labels, target_boxes, valid
