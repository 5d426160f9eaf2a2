"""Boxes: two formats, and two measures of how well two boxes agree.

    (B1) xyxy = (c_x − w/2, c_y − h/2, c_x + w/2, c_y + h/2)                  corners from centre and size; and back
    (B2) IoU(a, b)  = |a ∩ b| / |a ∪ b|                                       |·| is an area
    (B3) GIoU(a, b) = IoU(a, b) − (|hull| − |a ∪ b|) / |hull|                 hull: the smallest box around both

GIoU falls further, down to −1, the further apart two disjoint boxes are, where IoU is 0 for all of them and gives no
direction to learn from. A ratio of areas that are both 0 is taken as 0, in (B2) and in (B3): so a box without area has
an IoU of 0 with everything, itself included, and two boxes without area on a common axis-parallel line (or at one
point) have a GIoU of 0. No NaN arises from finite boxes.

Sources: method.md §5; GIoU is arXiv 1902.09630; DETR, "Bounding box loss".
"""

import numpy as np

from smca.reference.arrays import FloatArray


def cxcywh_to_xyxy(boxes_cxcywh: FloatArray) -> FloatArray:
    """Centre and size to corners. Equation (B1).

    Args:
        boxes_cxcywh: [..., 4], (centre x, centre y, width, height) in any unit.

    Returns:
        [..., 4], (left, top, right, bottom) in the same unit.

    Raises:
        ValueError: a last axis other than 4.

    >>> cxcywh_to_xyxy(np.array([0.5, 0.5, 0.5, 0.25])).tolist()
    [0.25, 0.375, 0.75, 0.625]
    """
    _check_last_axis("boxes_cxcywh", boxes_cxcywh)
    center_xy, size_wh = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return np.concatenate([center_xy - size_wh / 2, center_xy + size_wh / 2], axis=-1)


def xyxy_to_cxcywh(boxes_xyxy: FloatArray) -> FloatArray:
    """Corners to centre and size. Equation (B1), backwards.

    Args:
        boxes_xyxy: [..., 4], (left, top, right, bottom) in any unit.

    Returns:
        [..., 4], (centre x, centre y, width, height) in the same unit.

    Raises:
        ValueError: a last axis other than 4.

    >>> xyxy_to_cxcywh(np.array([0.25, 0.375, 0.75, 0.625])).tolist()
    [0.5, 0.5, 0.5, 0.25]
    """
    _check_last_axis("boxes_xyxy", boxes_xyxy)
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return np.concatenate([(top_left + bottom_right) / 2, bottom_right - top_left], axis=-1)


def box_iou(boxes1_xyxy: FloatArray, boxes2_xyxy: FloatArray) -> FloatArray:
    """Intersection over union, box by box. Equation (B2).

    Args:
        boxes1_xyxy: [..., 4], (left, top, right, bottom).
        boxes2_xyxy: [..., 4], in the same unit; broadcast against the first: [n, 1, 4] and [m, 4] give every pair.

    Returns:
        [...] in [0, 1]; 0 where neither box has an area.

    Raises:
        ValueError: another last axis, or a box whose right is left of its left or whose bottom is above its top.

    Two squares of 2 × 2, one step apart, share 1 × 2 of 6:

    >>> float(box_iou(np.array([0.0, 0.0, 2.0, 2.0]), np.array([1.0, 0.0, 3.0, 2.0])).round(4))
    0.3333
    """
    intersection, union, _ = _areas(boxes1_xyxy, boxes2_xyxy)
    return _ratio(intersection, union)


def generalized_box_iou(boxes1_xyxy: FloatArray, boxes2_xyxy: FloatArray) -> FloatArray:
    """Generalised intersection over union, box by box. Equation (B3).

    Args:
        boxes1_xyxy: [..., 4], (left, top, right, bottom).
        boxes2_xyxy: [..., 4], in the same unit; broadcast against the first: [n, 1, 4] and [m, 4] give every pair.

    Returns:
        [...] in [−1, 1]; 1 for equal boxes with an area, 0 where both lie on one axis-parallel line.

    Raises:
        ValueError: as `box_iou`.

    Two unit squares with one empty unit between them, in a hull of 3: 0 − (3 − 2)/3. And a box with itself:

    >>> square = np.array([0.0, 0.0, 1.0, 1.0])
    >>> generalized_box_iou(square, np.array([[2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 1.0, 1.0]])).round(4).tolist()
    [-0.3333, 1.0]
    """
    intersection, union, hull = _areas(boxes1_xyxy, boxes2_xyxy)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def _areas(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Areas of intersection, union and hull, each [...]."""
    _check_boxes("boxes1_xyxy", a)
    _check_boxes("boxes2_xyxy", b)
    overlap_wh = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0)
    intersection = np.prod(overlap_wh, axis=-1)
    union = np.prod(a[..., 2:] - a[..., :2], axis=-1) + np.prod(b[..., 2:] - b[..., :2], axis=-1) - intersection
    hull = np.prod(np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2]), axis=-1)
    return intersection, union, hull


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    """part / whole, 0 where both are 0 (the whole is never smaller than the part)."""
    return part / np.where(whole == 0, 1.0, whole)


def _check_last_axis(name: str, boxes: FloatArray) -> None:
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"{name}: expected shape (..., 4), got {boxes.shape}. A box is four numbers, last axis.")


def _check_boxes(name: str, boxes_xyxy: FloatArray) -> None:
    _check_last_axis(name, boxes_xyxy)
    inverted = np.any(boxes_xyxy[..., 2:] < boxes_xyxy[..., :2], axis=-1)
    if inverted.any():
        first = tuple(int(index[0]) for index in np.nonzero(inverted))
        raise ValueError(
            f"{name}[{', '.join(map(str, first))}]: expected left ≤ right and top ≤ bottom, got {boxes_xyxy[first].tolist()}. "
            "If it is (centre, size), convert it with cxcywh_to_xyxy first."
        )
