"""The detector's results for an image, in pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smca.gpu.config import ClassScores, ModelConfig

DRAW_THRESHOLD = 0.35
"""Lowest score that is drawn of a class without a threshold of its own: after training with focal loss, scores of real objects
start about there."""


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first."""

    scores: Tensor
    """[D] in 0–1."""
    labels: Tensor
    """[D] int64, index into the model's classes."""
    boxes_xyxy: Tensor
    """[D, 4] left, top, right, bottom in pixels of the original image."""
    queries: Tensor
    """[D] int64: which of the model's queries each is of; ``SMCADETR.explain(image, queries=…)`` shows why."""

    def reaching(self, thresholds: Tensor) -> Detections:
        """Those whose score is at least their class's threshold ([K], from ``draw_thresholds``), on the CPU."""
        scores, labels, boxes_xyxy = self.scores.cpu(), self.labels.cpu(), self.boxes_xyxy.cpu()
        kept = scores >= thresholds[labels]
        return Detections(scores[kept], labels[kept], boxes_xyxy[kept], self.queries.cpu()[kept])


def draw_thresholds(config: ModelConfig, threshold: float | None = None) -> Tensor:
    """[K] float64 on the CPU: the lowest score of each class that is drawn and written.

    Args:
        config: of the model. Of each class that ``score_thresholds`` has a threshold of, that one is taken; of others
            ``DRAW_THRESHOLD``.
        threshold: one for all classes instead.
    """
    saved = config.score_thresholds or (None,) * config.num_classes
    if threshold is not None:
        saved = (threshold,) * config.num_classes
    return torch.tensor([DRAW_THRESHOLD if score is None else score for score in saved], dtype=torch.float64)


def decode(
    logits: Tensor,
    boxes: Tensor,
    original_sizes: Tensor,
    max_detections: int = 100,
    *,
    class_scores: ClassScores = "sigmoid",
) -> list[Detections]:
    """The best (query, class) pairs of each image, in pixels of the original image.

    Args:
        logits: [B, N, K]. boxes: [B, N, 4] (cx, cy, w, h) in 0–1. original_sizes: [B, 2] (height, width) in pixels.
        max_detections: how many to keep per image.
        class_scores: of the model. Classes of a "softmax" exclude each other: each query has its best one only, as in DETR.

    Raises:
        ValueError: a logit or a box that is not finite.
    """
    batch, queries, classes = logits.shape
    pairs = queries if class_scores == "softmax" else queries * classes
    if not (logits.isfinite().all() and boxes.isfinite().all()):
        raise ValueError(
            "the network's output is not finite, so that nothing can be detected: its weights are damaged, or training diverged; "
            "take another checkpoint"
        )
    probabilities = logits.float().sigmoid()
    if class_scores == "softmax":
        best = probabilities.argmax(-1, keepdim=True)
        probabilities = torch.full_like(probabilities, -1.0).scatter(-1, best, probabilities.gather(-1, best))
    scores, flat = probabilities.flatten(1).topk(min(max_detections, pairs), dim=1)
    query, label = flat // classes, flat % classes
    height, width = original_sizes.to(boxes).unbind(-1)
    scale = torch.stack([width, height, width, height], dim=-1)[:, None]
    center, extent = boxes[..., :2], boxes[..., 2:]
    corners = torch.cat([center - extent / 2, center + extent / 2], dim=-1).clamp(0, 1) * scale
    corners = corners.gather(1, query[..., None].expand(-1, -1, 4))
    return [Detections(scores[b], label[b], corners[b].float(), query[b]) for b in range(batch)]
