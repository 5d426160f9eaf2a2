"""The set loss (docs/method.md §5) on padded targets: one matching per layer, classes + L1 + GIoU, summed over all layers; and the
losses of cells and of noised queries (§8), where the model has them.

Shape letters: M decoder layers, B images, N queries, K classes, T targets (padded), G groups of noised queries.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smca.datasets import Targets
from smca.gpu.config import LossConfig
from smca.gpu.loss.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from smca.gpu.loss.classification import matchability_loss, mean_cross_entropy, sigmoid_focal_loss
from smca.gpu.loss.count import boxes_per_process
from smca.gpu.loss.dense_loss import dense_loss
from smca.gpu.loss.matcher import BROKEN, match
from smca.gpu.loss.precision import in_float32


class SetCriterion(nn.Module):
    """Matches and scores the output of every decoder layer."""

    def __init__(self, config: LossConfig, *, matcher_backend: str = "auto") -> None:
        super().__init__()
        self.weights, self.classification = config.weights, config.classification
        self.no_object_weight = config.no_object_weight
        self.matcher_backend = matcher_backend

    def forward(
        self, outputs: dict[str, Tensor], targets: Targets, num_boxes: Tensor | None = None, parts: int = 1
    ) -> dict[str, Tensor]:
        """Terms of the loss, already weighted.

        Args:
            outputs: of the model in training: "logits" [M, B, N, K], "boxes" [M, B, N, 4] cxcywh in 0–1; for the loss "softmax"
                "class_logits" [M, B, N, K + 1]; and, if there are any, the "further_…" of noised queries and the "cell_…" of a
                dense head.
            targets: labels [B, T], boxes [B, T, 4] cxcywh in 0–1, valid [B, T].
            num_boxes: what sums are divided by: ``boxes_per_process`` of a whole step, of which these images are a part; None = of
                these images.
            parts: how many parts, of as many images each, the step has. The class term of "softmax" is a mean over the queries of
                these images, of which each part adds its share: the step has the mean over its parts, as over processes.

        Returns:
            "class/0", "l1/0", "giou/0", "class/1" … one scalar per term and layer, likewise "…/noised" and "…/cells", and "loss",
            the sum of all.

        Raises:
            ValueError: the loss "softmax" of outputs that have no "class_logits".
            NonFiniteError: as ``match``.
        """
        logits, boxes = in_float32(outputs["logits"]), in_float32(outputs["boxes"])
        cost = self.weights, self.classification
        query = match(logits, boxes, targets, *cost, backend=self.matcher_backend)  # [M, B, T]
        # A matching that is broken by NaN costs leaves its targets out; that layer's loss must not look healthy because of it.
        broken = torch.where((query == BROKEN).any(2).any(1), torch.nan, 0.0).to(logits.dtype)  # [M]
        by_name = loss_of_matching(logits, boxes, query, targets, self.classification)
        if num_boxes is None:
            num_boxes = boxes_per_process(targets.valid.sum())
        divisor = num_boxes.to(logits.dtype)
        per_layer = {name: self.weights[name] * value / divisor for name, value in by_name.items()}
        if self.classification == "softmax":
            mean = mean_cross_entropy(_class_logits(outputs), query, targets.labels, self.no_object_weight)
            per_layer = {"class": self.weights["class"] * mean / parts, **per_layer}
        per_layer["class"] = per_layer["class"] + broken
        terms = {f"{name}/{m}": value[m] for m in range(len(logits)) for name, value in per_layer.items()}
        terms |= further_losses(outputs, targets, self.weights, self.classification, num_boxes)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        return terms


def further_losses(
    outputs: Mapping[str, Tensor],
    targets: Targets,
    weights: Mapping[str, float],
    classification: str,
    num_boxes: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses that need no matching, of what there is: noised queries ("class/noised" …), cells ("class/cells" …)."""
    terms: dict[str, Tensor] = {}
    if "further_logits" in outputs:
        num_groups = outputs["further_logits"].shape[2] // (2 * targets.valid.shape[1])
        terms |= denoising_loss(outputs, targets, weights, num_groups, classification, num_boxes=num_boxes)
    if "cell_logits" in outputs:
        terms |= dense_loss(outputs, targets, weights, num_boxes=num_boxes)
    return terms


def denoising_loss(
    outputs: Mapping[str, Tensor],
    targets: Targets,
    weights: Mapping[str, float],
    num_groups: int,
    classification: str = "focal",
    *,
    num_boxes: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of noised queries, whose objects are known (equation (N6) of ``smca.reference.denoising``).

    Args:
        outputs: "further_logits" [M, B, G·2·T, K], "further_boxes" [M, B, G·2·T, 4].
        targets: labels [B, T], boxes [B, T, 4] cxcywh in 0–1, valid [B, T].
        weights: of the terms "class", "l1" and "giou".
        num_groups: G.
        classification: "focal" or "matchability".
        num_boxes: as of ``SetCriterion``.

    Returns:
        "class/noised", "l1/noised", "giou/noised": scalars, weighted, summed over layers.

    Raises:
        ValueError: the loss "softmax", which noised queries do not have.
    """
    if classification == "softmax":
        raise ValueError(
            'noised queries have no loss "softmax": take a model without them, or another loss.classification'
        )
    logits, boxes = in_float32(outputs["further_logits"]), in_float32(outputs["further_boxes"])
    layers, batch, _, classes = logits.shape
    count = targets.valid.shape[1]
    # Each group is like a layer by itself, of 2·T queries, of which the first T are matched to the objects, one to one.
    logits = logits.reshape(layers, batch, num_groups, 2 * count, classes).transpose(1, 2).flatten(0, 1)
    boxes = boxes.reshape(layers, batch, num_groups, 2 * count, 4).transpose(1, 2).flatten(0, 1)
    own = torch.where(targets.valid, torch.arange(count, device=logits.device), -1)
    counted = targets.valid.repeat(1, 2)  # [B, 2·T]
    by_name = loss_of_matching(
        logits, boxes, own.expand(len(logits), -1, -1), targets, classification, counted.to(logits.dtype)
    )
    if num_boxes is None:
        num_boxes = boxes_per_process(targets.valid.sum())
    divisor = num_boxes.to(logits.dtype) * num_groups
    return {f"{name}/noised": weights[name] * value.sum() / divisor for name, value in by_name.items()}


def loss_of_matching(
    logits: Tensor,
    boxes: Tensor,
    query: Tensor,
    targets: Targets,
    classification: str,
    counted: Tensor | None = None,
) -> dict[str, Tensor]:
    """The sums of the set loss for a given matching, without weight and divisor.

    Args:
        logits: [M, B, N, K]. boxes: [M, B, N, 4] cxcywh in 0–1.
        query: [M, B, T] of each target, below 0 where it has none.
        targets: labels [B, T], boxes [B, T, 4], valid [B, T]; padding may hold anything.
        classification: "focal", "matchability", or "softmax", whose class term is no sum (``mean_cross_entropy``).
        counted: [B, N] 1 for queries whose class counts, else 0; None = all of them.

    Returns:
        "class" (not of "softmax"), "l1", "giou", each [M].
    """
    matched = query >= 0
    query = query.clamp(min=0)
    pred = boxes.gather(2, query[..., None].expand(-1, -1, -1, 4))  # [M, B, T, 4]
    true = targets.boxes.to(boxes.dtype).expand_as(pred)
    true = true.masked_fill(~matched[..., None], 0.0)  # padding may hold anything
    corners = cxcywh_to_xyxy(pred), cxcywh_to_xyxy(true)
    l1 = ((pred - true).abs().sum(-1) * matched).sum((1, 2))
    giou = ((1 - generalized_box_iou(*corners)) * matched).sum((1, 2))

    if classification == "softmax":
        return {"l1": l1, "giou": giou}
    labels = targets.labels.expand(len(logits), -1, -1)
    if classification == "focal":
        hot = one_hot(query, labels, matched, logits.shape)
        per_logit = sigmoid_focal_loss(logits, hot)
    else:
        # A matched box that missed its object entirely has a quality of 0, and is matched all the same.
        hot = one_hot(query, labels, matched, logits.shape, 1 + box_iou(*corners).detach())
        per_logit = matchability_loss(logits, (hot - 1).clamp(min=0), hot > 0)
    if counted is not None:
        per_logit = per_logit * counted[..., None]
    return {"class": per_logit.sum((1, 2, 3)), "l1": l1, "giou": giou}


def one_hot(query: Tensor, labels: Tensor, matched: Tensor, shape: torch.Size, value: Tensor | None = None) -> Tensor:
    """`value` (1 if None) at (layer, image, query, class) of each matched pair, else 0: query, labels, matched, value [M, B, T]
    → [M, B, N, K]."""
    _, _, queries, classes = shape
    # Unmatched targets write into one spare column that is cut off again, so that shapes stay static.
    flat = torch.where(matched, query * classes + labels, queries * classes)
    dtype = torch.float32 if value is None else value.dtype
    target = torch.zeros(*shape[:2], queries * classes + 1, dtype=dtype, device=query.device)
    target = target.scatter_(2, flat, 1.0) if value is None else target.scatter_(2, flat, value)
    return target[..., :-1].reshape(shape)


def _class_logits(outputs: Mapping[str, Tensor]) -> Tensor:
    """What the softmax is of, [M, B, N, K + 1]."""
    if "class_logits" not in outputs:
        raise ValueError(
            f'the loss "softmax" needs the outputs "class_logits" of a model with class_scores="softmax", got {sorted(outputs)}: '
            'set model.class_scores="softmax", or another loss.classification'
        )
    return in_float32(outputs["class_logits"])
