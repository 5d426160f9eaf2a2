"""Beyond the paper: every cell classifies and regresses, and the best cells become queries.

SMCA lets a query predict where it looks, but what it predicts from is the same learned vector for every image. Here the
encoder's cells say where something is, and queries begin there. For the cell in column i and row j of level m, x its
encoded channels (0 where padded), (w, h) the unpadded image in cells of that level, J the coarsest level:

    (H1) anchor     = ( (i + ½)/w, (j + ½)/h, 1/w, 1/h )                      the cell itself, cxcywh in 0–1 of the image
    (H2) logits     = class_head(x)
         box logits = box_head(x) + [ logit(clip(anchor_xy, 0.01, 0.99)), logit(s_m), logit(s_m) ]
         s_m        = σ(−1.5)·stride_m/stride_J                               0.18 of the image's sides in the coarsest level
    (H3) score      = max over classes of σ(logits)                           −1 where padded
    (H4) peak       = no cell of the 3 × 3 around it, in its level, scores higher
    (H5) rank cells of all levels by score + [peak], highest first            one object is found by several neighbours
    (H6) query n starts on the box logits of cell n of that order; without so many unpadded cells, on point n of
         `spread_points`, with −1.5 for the logits of its sides

In training, the cells have a loss of their own (`dense_loss`), and no gradient passes from a query to the cell that it
started on. Sources: two-stage Deformable DETR, arXiv 2010.04159, appendix A.4, and DINO, arXiv 2203.03605, section 3.4
("mixed query selection": boxes are selected, contents learned), for (H2) and (H6); peaks as in CenterNet, arXiv
1904.07850, section 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray, IntArray
from smca.reference.layers import Params, linear, mlp, sigmoid
from smca.reference.position import Grid, map_centers

START_SIZE_LOGIT = -1.5
"""Of a box's width and height before training, as fractions of the image: σ(−1.5) = 0.18."""
HALF, QUOTIENTS = 5_000_000_000, (7_548_776_662, 5_698_402_910)
"""½, 1/ρ and 1/ρ² to ten digits."""
LEAST_CENTER = 0.01
"""Cells closer to the border than this fraction of the image start their boxes there: logit(0) is −∞."""


class Cells(NamedTuple):
    """What the cells of all levels say, one level after the other, ΣL in all."""

    anchors: FloatArray
    """[B, ΣL, 4], (H1): cxcywh in 0–1 of the unpadded image."""
    padding: BoolArray
    """[B, ΣL], True where a cell holds no pixel of the image."""
    logits: FloatArray
    """[B, ΣL, K]."""
    box_logits: FloatArray
    """[B, ΣL, 4]; their σ is cxcywh in 0–1 of the unpadded image."""


def dense_head(memory: Sequence[FloatArray], grids: Sequence[Grid], params: Params) -> Cells:
    """Classes and boxes of every cell. Equations (H1) and (H2).

    Args:
        memory: the encoder's output, J arrays [B, L_j, C]; padded cells may hold anything.
        grids: where their cells are.
        params: dense_head.class_head, linear, C → K; dense_head.box_head, two layers, C → C → 4.
    """
    padding = np.concatenate([grid.key_padding_mask for grid in grids], axis=1)
    x = np.where(padding[..., None], 0.0, np.concatenate(memory, axis=1))
    anchors, starts = [], []
    for grid in grids:
        anchor = cell_anchors(grid)
        side = sigmoid(np.array(START_SIZE_LOGIT)) * grid.stride / grids[-1].stride  # s_m
        centers = np.clip(anchor[..., :2], LEAST_CENTER, 1 - LEAST_CENTER)
        anchors.append(anchor)
        starts.append(logit(np.concatenate([centers, np.full_like(centers, side)], axis=-1)))
    return Cells(
        anchors=np.concatenate(anchors, axis=1),
        padding=padding,
        logits=linear(x, params, "dense_head.class_head"),
        box_logits=mlp(x, params, "dense_head.box_head", layers=2) + np.concatenate(starts, axis=1),
    )


def cell_anchors(grid: Grid) -> FloatArray:
    """The cells of a level as boxes, [B, L, 4], cxcywh in 0–1 of the unpadded image. Equation (H1).

    An image of one cell by two, on a map of that size:

    >>> none = np.zeros((1, 2))
    >>> cell_anchors(Grid((1, 2), 8, np.array([[1.0, 2.0]]), none.astype(bool), none)).tolist()
    [[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]]
    """
    extent = grid.valid_cells[:, None, ::-1]  # [B, 1, 2], (w, h)
    centers = map_centers(grid.size) / extent
    return np.concatenate([centers, np.broadcast_to(1.0 / extent, centers.shape)], axis=-1)


def select_queries(cells: Cells, grids: Sequence[Grid], num_queries: int) -> FloatArray:
    """The box logits on which queries start, [B, N, 4]. Equations (H3) to (H6).

    Three cells in a row, with scores that rise to the left. The last is the lowest; the middle one scores higher, but
    is no peak, and neither is the last: the order is that of the scores.

    >>> grid = Grid((1, 3), 8, np.array([[1.0, 3.0]]), np.zeros((1, 3), dtype=bool), np.zeros((1, 3, 4)))
    >>> boxes = np.arange(12.0).reshape(1, 3, 4)
    >>> cells = Cells(cell_anchors(grid), grid.key_padding_mask, np.array([[[2.0], [1.0], [0.0]]]), boxes)
    >>> select_queries(cells, [grid], 2)[..., 0].tolist()
    [[0.0, 4.0]]

    With a dip in the middle, both ends are peaks:

    >>> select_queries(cells._replace(logits=np.array([[[2.0], [0.0], [1.0]]])), [grid], 2)[..., 0].tolist()
    [[0.0, 8.0]]
    """
    score = np.where(cells.padding, -1.0, sigmoid(cells.logits.max(axis=-1)))  # (H3) [B, ΣL]
    ends = np.cumsum([grid.size[0] * grid.size[1] for grid in grids])[:-1]
    peaks = [is_peak(part, grid.size) for part, grid in zip(np.split(score, ends, axis=1), grids, strict=True)]
    rank = np.where(cells.padding, -1.0, score + np.concatenate(peaks, axis=1))
    order = np.argsort(-rank, axis=1, kind="stable")[:, :num_queries]  # (H5)
    chosen = np.take_along_axis(cells.box_logits, order[..., None], axis=1)
    unpadded = np.take_along_axis(rank, order, axis=1) > -1.0

    start = np.full((num_queries, 4), START_SIZE_LOGIT)
    start[:, :2] = logit(spread_points(num_queries))
    queries = np.broadcast_to(start, (len(score), num_queries, 4)).copy()
    queries[:, : order.shape[1]] = np.where(unpadded[..., None], chosen, queries[:, : order.shape[1]])  # (H6)
    return queries


def is_peak(score: FloatArray, size: tuple[int, int]) -> BoolArray:
    """Whether no neighbour scores higher, [B, H·W] → [B, H·W]. Equation (H4); beyond the map there is none.

    >>> is_peak(np.array([[3.0, 1.0, 2.0, 2.0]]), (1, 4)).astype(int).tolist()
    [[1, 0, 1, 1]]
    """
    height, width = size
    maps = np.pad(score.reshape(-1, height, width), ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    shifted = [maps[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    peak: BoolArray = score >= np.max(shifted, axis=0).reshape(score.shape)
    return peak


def spread_points(count: int) -> FloatArray:
    """Points (x, y) in (0, 1), [count, 2], spread evenly over the image for any count: the R2 low-discrepancy sequence.

    Point n is the fraction of ½ + n/ρ and of ½ + n/ρ², ρ the real root of x³ = x + 1 and both quotients to ten digits (so
    that whole numbers give it, in any precision), kept 0.02 off the borders. Source: M. Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018.

    >>> spread_points(2).round(3).tolist()
    [[0.255, 0.07], [0.02, 0.64]]
    """
    n = np.arange(1, count + 1)[:, None]
    digits: IntArray = (HALF + n * np.array(QUOTIENTS)) % (2 * HALF)
    return np.clip(digits / (2.0 * HALF), 0.02, 0.98)


def logit(p: FloatArray) -> FloatArray:
    """ln(p/(1 − p)), the inverse of σ, elementwise.

    >>> logit(np.array([0.5, 0.75])).round(4).tolist()
    [0.0, 1.0986]
    """
    result: FloatArray = np.log(p) - np.log1p(-p)
    return result
