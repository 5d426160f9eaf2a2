"""Boxes against boxes, and Gaussians against boxes, in NumPy."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from smca.datasets.batch import FloatArray


def ious(a_xyxy: FloatArray, b_xyxy: FloatArray) -> FloatArray:
    """[..., A, 4], [B, 4] → [..., A, B]; 0 where both have no area."""
    a, b = a_xyxy[..., :, None, :], b_xyxy
    common = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - common
    overlaps: FloatArray = common / np.maximum(union, 1e-12)
    return overlaps


def covered_share(
    centers_xy: FloatArray, sigmas_xy: FloatArray, level_weights: FloatArray, box_xyxy: FloatArray
) -> FloatArray:
    """How much of each query's Gaussians lies on a box, heads averaged and levels weighed.

    Args:
        centers_xy, sigmas_xy: [..., h, J, 2]; level_weights: [..., J]; box_xyxy: [4], all in one unit.

    Returns:
        [...] in 0–1; a flat prior (σ = ∞) is everywhere, and so on the box: 1.
    """
    flat = ~np.isfinite(sigmas_xy)
    below = [ndtr((edge - centers_xy) / sigmas_xy) for edge in (box_xyxy[:2], box_xyxy[2:])]
    inside = np.where(flat, 1.0, below[1] - below[0]).prod(axis=-1).mean(axis=-2)  # [..., J]
    share: FloatArray = (inside * level_weights).sum(axis=-1)
    return share
