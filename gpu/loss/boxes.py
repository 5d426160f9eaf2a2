"""Box arithmetic on torch tensors, elementwise: the pairs of a loss, or by broadcasting every pair of a cost matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """[..., 4] (centre x, centre y, width, height) → [..., 4] (left, top, right, bottom)."""
    center, extent = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([center - extent / 2, center + extent / 2], dim=-1)


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Intersection over union of boxes, broadcast against each other: [..., 4], [..., 4] → [...]; 0 where neither has an area."""
    low = torch.maximum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    high = torch.minimum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    overlap = _product((high - low).clamp(min=0))
    union = _area(boxes1_xyxy) + _area(boxes2_xyxy) - overlap
    return overlap / union.clamp(min=torch.finfo(overlap.dtype).tiny)


def generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes, broadcast against each other: [..., 4], [..., 4] → [...].

    Empty unions and empty hulls count as overlap 0 and gap 0, so degenerate boxes give finite values and gradients.
    """
    low, high = (
        torch.maximum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2]),
        torch.minimum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:]),
    )
    overlap = _product((high - low).clamp(min=0))
    union = _area(boxes1_xyxy) + _area(boxes2_xyxy) - overlap
    hull_low, hull_high = (
        torch.minimum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2]),
        torch.maximum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:]),
    )
    hull = _product((hull_high - hull_low).clamp(min=0))
    tiny = torch.finfo(overlap.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _area(xyxy: Tensor) -> Tensor:
    return _product(xyxy[..., 2:] - xyxy[..., :2])


def _product(sides: Tensor) -> Tensor:
    """[..., 2] → [...]. Not ``prod``, whose backward pass counts the zeros and waits for the device to do so."""
    return sides[..., 0] * sides[..., 1]
