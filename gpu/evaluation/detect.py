"""A model's detections as COCO results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from smca.datasets import Batch
from smca.gpu.model import SMCADETR, decode


@torch.inference_mode()
def detect(model: SMCADETR, loader: Iterable[Batch]) -> list[dict[str, Any]]:
    """Run `model` over all batches; returns COCO results (image_id, category_id, bbox in xywh pixels, score).

    It keeps as many detections per image as the model has queries, at least 100: COCO counts the best 100 of each class.
    """
    training = model.training
    model.eval()
    device = model.pixel_mean.device
    category_ids = model.config.category_ids or tuple(range(model.config.num_classes))
    results: list[dict[str, Any]] = []
    for host_batch in loader:
        batch = host_batch.to(device)
        outputs = model(batch.images, batch.padding_mask if host_batch.padding_mask.any() else None)
        detected = decode(
            outputs["logits"][-1],
            outputs["boxes"][-1],
            batch.original_sizes,
            max(100, model.config.num_queries),
            class_scores=model.config.class_scores,
        )
        for image_id, detections in zip(host_batch.image_ids.tolist(), detected, strict=True):
            results += coco_results(detections.scores, detections.labels, detections.boxes_xyxy, image_id, category_ids)
    model.train(training)
    return results


def coco_results(
    scores: torch.Tensor, labels: torch.Tensor, boxes_xyxy: torch.Tensor, image_id: int, category_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Detections of one image as COCO results: bbox = [left, top, width, height] in pixels."""
    boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for score, label, box in zip(scores.tolist(), labels.tolist(), boxes_xywh, strict=True)
    ]
