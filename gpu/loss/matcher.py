"""Bipartite matching: each ground-truth box gets one query, at the least total cost (docs/method.md §5).

Costs are formed only between an image's predictions and its own targets, for all decoder layers at once.

``scipy``  makes one copy to the host and solves the M·B assignments there.
``cupy``   solves them in one launch on the GPU and waits for nothing (``assignment``). Needs CuPy.
``auto``   takes ``cupy`` where it can run. On a machine with a GPU where it cannot, it warns once and names the reason.

Shape letters: M decoder layers, B images, N queries, K classes, T targets (padded).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from smca.datasets import Targets
from smca.gpu.loss import assignment
from smca.gpu.loss.boxes import cxcywh_to_xyxy, generalized_box_iou
from smca.gpu.loss.precision import in_float32

BACKENDS = ("auto", "scipy", "cupy")
BROKEN = -2
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


class NonFiniteError(ValueError):
    """A cost, loss or gradient is NaN or infinite."""


@torch.no_grad()
def match_costs(
    logits: Tensor, boxes: Tensor, targets: Targets, weights: Mapping[str, float], classification: str = "focal"
) -> Tensor:
    """Cost of giving each target to each query of the same image (docs/method.md §5).

    Args:
        logits: [M, B, N, K]. boxes: [M, B, N, 4] cxcywh in 0–1.
        targets: labels [B, T], boxes [B, T, 4], valid [B, T]; what is padded gets a cost like any other, to be ignored.
        weights: of the terms "class", "l1" and "giou".
        classification: of the loss: for "softmax" the class costs −p, as in DETR; otherwise what the focal loss would change by.

    Returns:
        [M, B, N, T], in at least float32.
    """
    logits, boxes = in_float32(logits), in_float32(boxes)
    layers, batch, queries, _ = logits.shape
    # Only the targets' own classes enter; gathering first keeps this at N × T instead of N × K.
    labels = targets.labels[None, :, None].expand(layers, batch, queries, -1)
    logit = logits.gather(-1, labels)  # [M, B, N, T]
    p = logit.sigmoid()
    if classification == "softmax":
        cost_class = -p
    else:
        positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -functional.logsigmoid(logit)
        negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -functional.logsigmoid(-logit)
        cost_class = positive - negative
    pred, true = boxes[..., :, None, :], targets.boxes.to(boxes.dtype)[:, None]  # [M, B, N, 1, 4], [B, 1, T, 4]
    l1 = (pred - true).abs().sum(-1)
    giou = generalized_box_iou(cxcywh_to_xyxy(pred), cxcywh_to_xyxy(true))
    return weights["class"] * cost_class + weights["l1"] * l1 - weights["giou"] * giou


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    weights: Mapping[str, float],
    classification: str = "focal",
    *,
    backend: str = "auto",
) -> Tensor:
    """The query of each target, for every layer and image.

    Args:
        logits: [M, B, N, K]. boxes: [M, B, N, 4] cxcywh in 0–1.
        targets: labels [B, T], boxes [B, T, 4], valid [B, T].
        weights: of the terms "class", "l1" and "giou".
        classification: of the loss, as ``match_costs`` takes it.
        backend: "scipy", "cupy" or "auto".

    Returns:
        [M, B, T] int64 on the device of `logits`; −1 where a target is padding, or where there are more targets than queries
        and the cheapest assignment leaves this one out. From "cupy", −2 (``BROKEN``) throughout a problem with a cost
        that is not finite: it cannot raise without waiting for the GPU. ``SetCriterion`` makes the loss of such a problem NaN.

    Raises:
        ValueError: an unknown backend, or one that cannot run here.
        NonFiniteError: from "scipy", a cost that is not finite; the message names layer, image, query and target.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown matcher backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    cost = match_costs(logits, boxes, targets, weights, classification)
    missing = "it takes float32 costs" if cost.dtype != torch.float32 else assignment.available(cost.device)
    if backend == "cupy" and missing:
        raise ValueError(f"matcher backend 'cupy' cannot run here: {missing}")
    if backend == "scipy" or missing:
        if missing and cost.is_cuda and backend == "auto" and not torch.compiler.is_compiling():
            _warn_once(missing)
        return _match_scipy(cost, targets.valid)  # type: ignore[no-any-return]  # ops are untyped
    query, status = assignment.assign(cost, targets.valid)
    return torch.where(status[..., None] >= 0, BROKEN, query)


@functools.cache
def _warn_once(missing: str) -> None:
    warnings.warn(f"matching on the host, while the GPU waits: {missing}", stacklevel=3)


@torch.library.custom_op("smca::match_scipy", mutates_args=())
def _match_scipy(cost: Tensor, valid: Tensor) -> Tensor:
    """[M, B, N, T] costs and [B, T] → [M, B, T] int64. An op, so that torch.compile passes it by without a graph break."""
    costs = cost.cpu().numpy()
    columns = [np.flatnonzero(row) for row in valid.cpu().numpy()]
    matched = np.full((*costs.shape[:2], costs.shape[3]), -1, dtype=np.int64)
    for layer in range(costs.shape[0]):
        for image, column in enumerate(columns):
            problem = costs[layer, image][:, column]
            if not np.isfinite(problem).all():
                query, target = np.argwhere(~np.isfinite(problem))[0]
                raise NonFiniteError(
                    f"matching cost of decoder layer {layer}, image {image} of the batch is {problem[query, target]} for query "
                    f"{query} and target {column[target]}: the network's output or this image's boxes are not finite"
                )
            rows, cols = linear_sum_assignment(problem)
            matched[layer, image, column[cols]] = rows
    return torch.from_numpy(matched).to(cost.device)


@_match_scipy.register_fake
def _(cost: Tensor, valid: Tensor) -> Tensor:
    layers, batch, _, targets = cost.shape
    return torch.empty((layers, batch, targets), dtype=torch.int64, device=cost.device)
