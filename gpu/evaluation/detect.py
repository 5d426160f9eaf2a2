"""A model's detections as COCO results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from smca.datasets import Batch
from smca.gpu.config import ModelConfig
from smca.gpu.evaluation.coco import COUNTED
from smca.gpu.model import SMCADETR, Detections, decode
from smca.gpu.model.encoded import evaluating


@torch.inference_mode()
def detect(model: SMCADETR, loader: Iterable[Batch]) -> list[dict[str, Any]]:
    """Run `model` over all batches; returns COCO results (image_id, category_id, bbox in xywh pixels, score).

    It keeps as many detections per image as the model has queries, at least 100: COCO counts the best 100 of each class.
    """
    device, ids = model.pixel_mean.device, model.config.ids
    results: list[dict[str, Any]] = []
    with evaluating(model):
        for host_batch in loader:
            batch = host_batch.to(device)
            outputs = model(batch.images, batch.padding_mask if host_batch.padding_mask.any() else None)
            detected = decode_counted(outputs["logits"][-1], outputs["boxes"][-1], batch.original_sizes, model.config)
            for image_id, found in zip(host_batch.image_ids.tolist(), detected, strict=True):
                results += coco_results(found.scores, found.labels, found.boxes_xyxy, image_id, ids)
    return results


def decode_counted(
    logits: torch.Tensor, boxes: torch.Tensor, original_sizes: torch.Tensor, config: ModelConfig
) -> list[Detections]:
    """``decode``, with as many detections per image as the model has queries, at least COUNTED."""
    most = max(COUNTED, config.num_queries)
    return decode(logits, boxes, original_sizes, most, class_scores=config.class_scores)


def coco_results(
    scores: torch.Tensor, labels: torch.Tensor, boxes_xyxy: torch.Tensor, image_id: int, category_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Detections of one image as COCO results: bbox = [left, top, width, height] in pixels."""
    boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], dim=1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for score, label, box in zip(scores.tolist(), labels.tolist(), boxes_xywh, strict=True)
    ]
