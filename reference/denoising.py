"""Beyond the paper: queries that begin as noised objects, so that the decoder learns to correct boxes from the first step.

Matching changes from step to step while the network is young. A query made from an object is told what to find: its
loss needs no matching. There are G groups, each with a positive and a negative query for each of T (padded) objects: in
all D = G·2·T queries per image, in the order group, kind, object. For an object with the box (x0, y0, x1, y1), width w
and height h, for each corner coordinate u drawn from [0, 1) and a sign s from ±1 (so that no corner moves as far as the middle):

    (N1) corner'   = clip( corner + s·(u + kind)·0.4·side/2, 0, 1 )           kind 0: positive, 1: negative; side w or h
    (N2) box       = of the corners', sides at least 0.01;  (½, ½, ½, ½) for padding
    (N3) ref       = logit(clip(box as cxcywh, 0.005, 0.995))                 what `decoder` calls ref
    (N4) label     = the object's, or with probability 0.2 one drawn from all classes;  t = label_embed[label]
    (N5) a query attends to the real objects' queries of its own group, and to itself, and to nothing else

    (N6) class/noised, l1/noised, giou/noised: the terms (S4) to (S6) of `losses`, with boxes·G in place of boxes, where
         a positive query is matched to its own object, a negative one to none, and one of padding does not count; each is
         summed over all decoder layers

Sources: DN-DETR, arXiv 2203.01305, sections 4.1 to 4.3; DINO, arXiv 2203.03605, section 3.3, for the negatives.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, IntArray, require_shape
from smca.reference.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from smca.reference.decoder import FurtherQueries
from smca.reference.losses import PaddedTargets, loss_of_pairs
from smca.reference.matching import check_weights

BOX_NOISE = 0.4
"""In half sides: how far a positive query's corners move at most, and a negative one's at least."""
LABEL_NOISE = 0.2
"""Probability that a label is drawn anew."""
LEAST_SIDE = 0.01
LEAST_COORDINATE = 0.005


class Noise(NamedTuple):
    """What is drawn for a batch: (N1) and (N4)."""

    corners: FloatArray
    """[B, G, 2, T, 4], s·(u + kind)·0.4 for each corner coordinate: in half sides, x0, y0, x1, y1."""
    labels: IntArray
    """[B, G, 2, T], the object's label, or another."""


def noised_queries(targets: PaddedTargets, noise: Noise) -> FurtherQueries:
    """Queries from a batch's objects and what was drawn. Equations (N1) to (N5).

    Args:
        targets: of the batch; padding may hold anything.
        noise: as drawn.

    Raises:
        ValueError: shapes that don't fit.

    One object whose corners move by 0.2 half sides to the left and up, in the positive and in the negative query:

    >>> noise = Noise(np.full((1, 1, 2, 1, 4), -0.2), np.zeros((1, 1, 2, 1), dtype=int))
    >>> from smca.reference.losses import Targets
    >>> one = Targets(np.array([[0]]), np.array([[[0.5, 0.5, 0.4, 0.2]]]), np.array([[True]]))
    >>> queries = noised_queries(one, noise)
    >>> (1 / (1 + np.exp(-queries.box_logits[0, 0]))).round(4).tolist()
    [0.46, 0.48, 0.4, 0.2]
    >>> queries.sees[0].astype(int).tolist()
    [[1, 1], [1, 1]]
    """
    valid = np.asarray(targets.valid, dtype=np.bool_)
    batch, count = valid.shape
    require_shape("noise.corners", noise.corners, (batch, None, 2, count, 4), "Draw for every group, kind and object.")
    groups = noise.corners.shape[1]
    shape = (batch, groups, 2, count)
    require_shape("noise.labels", noise.labels, shape, "Draw one label per group, kind and object.")
    real = np.broadcast_to(valid[:, None, None], shape)
    boxes = np.where(real[..., None], np.asarray(targets.boxes, dtype=np.float64)[:, None, None], 0.5)
    half_sides = np.concatenate([boxes[..., 2:], boxes[..., 2:]], axis=-1) / 2
    corners = np.clip(cxcywh_to_xyxy(boxes) + noise.corners * half_sides, 0.0, 1.0)  # (N1)
    noised = xyxy_to_cxcywh(corners)
    noised[..., 2:] = np.maximum(noised[..., 2:], LEAST_SIDE)
    noised = np.where(real[..., None], noised, 0.5)  # (N2)
    p = np.clip(noised, LEAST_COORDINATE, 1 - LEAST_COORDINATE)

    queries = groups * 2 * count
    group = np.arange(queries) // max(1, 2 * count)
    sees = (group[:, None] == group) & real.reshape(batch, 1, queries)
    sees = sees | np.eye(queries, dtype=bool)  # (N5)
    return FurtherQueries(np.log(p / (1 - p)).reshape(batch, queries, 4), noise.labels.reshape(batch, queries), sees)


def denoising_loss(
    outputs: Mapping[str, npt.ArrayLike],
    targets: PaddedTargets,
    weights: Mapping[str, float],
    num_groups: int,
    classification: str = "focal",
) -> dict[str, float]:
    """The loss of the noised queries. Equation (N6).

    Args:
        outputs: "further_logits" [M, B, D, K] and "further_boxes" [M, B, D, 4], as `model.forward` returns them.
        targets: of the batch, T objects, padded.
        weights: "class", "l1" and "giou", as in `losses`.
        num_groups: G; D = G·2·T.
        classification: "focal" or "matchability", as in `losses`.

    Returns:
        "class/noised", "l1/noised" and "giou/noised", each with its weight in it.

    Raises:
        ValueError: shapes that don't fit; weights or a classification that `losses` refuses.

    A positive and a negative query that both found the object's box, at p = ½ for the one class: focal 0.0433 and 0.13.

    >>> outputs = {"further_logits": np.zeros((1, 1, 2, 1)), "further_boxes": np.full((1, 1, 2, 4), 0.5)}
    >>> from smca.reference.losses import Targets
    >>> one = Targets(np.array([[0]]), np.full((1, 1, 4), 0.5), np.array([[True]]))
    >>> terms = denoising_loss(outputs, one, {"class": 2.0, "l1": 5.0, "giou": 2.0}, 1)
    >>> {name: round(value, 4) for name, value in terms.items()}
    {'class/noised': 0.3466, 'l1/noised': 0.0, 'giou/noised': 0.0}
    """
    check_weights(weights)
    if classification == "softmax":
        raise ValueError('classification: expected "focal" or "matchability" of noised queries, got "softmax".')
    logits = np.asarray(outputs["further_logits"], dtype=np.float64)
    boxes = np.asarray(outputs["further_boxes"], dtype=np.float64)
    labels, valid = np.asarray(targets.labels, dtype=np.int64), np.asarray(targets.valid, dtype=np.bool_)
    target_boxes = np.asarray(targets.boxes, dtype=np.float64)
    batch, count = valid.shape
    require_shape("outputs['further_logits']", logits, (None, batch, num_groups * 2 * count, None), "D = G·2·T.")
    require_shape("outputs['further_boxes']", boxes, (*logits.shape[:3], 4), "Give one box for every query in logits.")

    number = max(1, int(valid.sum())) * num_groups
    sums = dict.fromkeys(("class", "l1", "giou"), 0.0)
    image, target = np.nonzero(valid)
    for layer, group in np.ndindex(logits.shape[0], num_groups):
        first = group * 2 * count
        positive, negative = first + target, first + count + target
        # Only the real objects' queries, of both kinds; the positive ones, which come first, are matched to their objects.
        own_logits = np.concatenate([logits[layer, image, positive], logits[layer, image, negative]])[None]
        own_boxes = np.concatenate([boxes[layer, image, positive], boxes[layer, image, negative]])[None]
        pairs = np.zeros(len(image), dtype=np.int64), np.arange(len(image))
        found = loss_of_pairs(
            own_logits, own_boxes, pairs, labels[image, target], target_boxes[image, target], classification
        )
        sums = {term: sums[term] + found[term] for term in sums}
    return {f"{term}/noised": float(weights[term] * total / number) for term, total in sums.items()}


def draw_noise(rng: np.random.Generator, labels: npt.ArrayLike, num_groups: int, num_classes: int) -> Noise:
    """Draw for a batch's labels [B, T]. Equations (N1) and (N4).

    >>> noise = draw_noise(np.random.default_rng(0), [[1, 0, 2]], 2, 3)
    >>> [bool(np.all((low <= abs(x)) & (abs(x) < low + 0.4))) for x, low in zip(np.moveaxis(noise.corners, 2, 0), (0, 0.4))]
    [True, True]
    """
    labels = np.asarray(labels, dtype=np.int64)
    shape = (labels.shape[0], num_groups, 2, labels.shape[1])
    kind = np.arange(2).reshape(2, 1, 1)
    sign = rng.choice([-1.0, 1.0], (*shape, 4))
    corners = sign * (rng.random((*shape, 4)) + kind) * BOX_NOISE
    other = rng.integers(0, num_classes, shape)
    flipped = rng.random(shape) < LABEL_NOISE
    return Noise(corners, np.where(flipped, other, np.broadcast_to(labels[:, None, None], shape)))
