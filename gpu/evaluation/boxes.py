"""Boxes against boxes, and Gaussians against boxes, in NumPy."""

from __future__ import annotations

import numpy as np

from smca.datasets.batch import FloatArray


def ious(a_xyxy: FloatArray, b_xyxy: FloatArray) -> FloatArray:
    """[..., A, 4], [B, 4] → [..., A, B]; 0 where both have no area."""
    a, b = a_xyxy[..., :, None, :], b_xyxy
    common = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - common
    overlaps: FloatArray = common / np.maximum(union, 1e-12)
    return overlaps


def coverage(
    centers_xy: FloatArray, sigmas_xy: FloatArray, level_weights: FloatArray, box_xyxy: FloatArray
) -> FloatArray:
    """What Gaussians, whose highest value is 1, are worth in the middle of a box: at the nearest point of the box of a quarter
    its sides, so that one that lies there covers it however narrow it is. Of each query the best head counts, levels weighed.

    Args:
        centers_xy, sigmas_xy: [..., h, J, 2]; level_weights: [..., J]; box_xyxy: [4], all in one unit.

    Returns:
        [...] in 0–1; a flat prior (σ = ∞) is worth 1 everywhere.
    """
    middle, side = (box_xyxy[:2] + box_xyxy[2:]) / 2, box_xyxy[2:] - box_xyxy[:2]
    low, high = middle - side / 8, middle + side / 8
    away = np.maximum(low - centers_xy, centers_xy - high).clip(0) / sigmas_xy
    values = np.exp(-np.square(away).sum(axis=-1) / 2).max(axis=-2)  # [..., J]
    weighed: FloatArray = (values * level_weights).sum(axis=-1)
    return weighed
