"""Cells that classify and regress, the best of which queries start on (docs/method.md §8; equations (H1) to (H6) of
``smca.reference.dense_head``).

Shape letters: B images, N queries, C channels, K classes, ΣL cells of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from smca.gpu.config import ModelConfig
from smca.gpu.model.layers import MLP, Grid, in_full_precision, joint_padding_mask, set_class_prior, split_levels
from smca.gpu.model.position import map_centers, spread_points

START_SIZE_LOGIT = -1.5
"""Logit of the width and height of a box before training: 0.18 of the image."""
LEAST_CENTER = 0.01
"""Cells closer to the border than this fraction of the image start their boxes there: logit(0) is −∞."""


class Cells(NamedTuple):
    """What the cells of all levels say, one level after the other."""

    anchors: Tensor
    """[B, ΣL, 4] the cells themselves, cxcywh in 0–1 of the unpadded image."""
    padding: Tensor
    """[B, ΣL] bool, True = the cell holds no pixel of the image."""
    logits: Tensor
    """[B, ΣL, K]."""
    box_logits: Tensor
    """[B, ΣL, 4]; their sigmoid is cxcywh in 0–1 of the unpadded image."""


class DenseHead(nn.Module):
    """Class logits and a box of every cell."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.class_head = nn.Linear(dim, config.num_classes)
        self.box_head = MLP(dim, dim, 4)
        # Boxes start in proportion to the cells, at the usual size in the coarsest level.
        strides = config.decoder_strides
        sides = [stride / strides[-1] / (1 + math.exp(-START_SIZE_LOGIT)) for stride in strides]
        self.start_size_logits = [math.log(side / (1 - side)) for side in sides]

    def reset_parameters(self) -> None:
        """Every cell starts with a box of the same size around itself, and with the usual score."""
        nn.init.zeros_(self.box_head.last.weight)
        nn.init.zeros_(self.box_head.last.bias)
        nn.init.normal_(self.class_head.weight, std=0.01)
        set_class_prior(self.class_head)

    def forward(self, memory: Tensor, grids: Sequence[Grid]) -> Cells:
        """memory [B, ΣL, C]: the encoder's output; in padded cells it may hold anything that is finite."""
        padding = joint_padding_mask(grids)
        x = memory if padding is None else memory.masked_fill(padding[..., None], 0.0)
        dtype = grids[0].valid_cells.dtype  # at least float32, also under autocast
        anchors = [cell_anchors(grid) for grid in grids]
        starts = [
            functional.pad(anchor[..., :2].clamp(LEAST_CENTER, 1 - LEAST_CENTER).logit(), (0, 2), value=size)
            for anchor, size in zip(anchors, self.start_size_logits, strict=True)
        ]
        return Cells(
            anchors=torch.cat(anchors, dim=1),
            padding=x.new_zeros(x.shape[:2], dtype=torch.bool) if padding is None else padding,
            logits=in_full_precision(self.class_head, x),
            box_logits=in_full_precision(self.box_head, x).to(dtype) + torch.cat(starts, dim=1),
        )


def cell_anchors(grid: Grid) -> Tensor:
    """The cells of a level as boxes: [B, L, 4] cxcywh in 0–1 of the unpadded image."""
    extent = grid.valid_cells.flip(-1)[:, None]  # [B, 1, 2] (w, h)
    centers = map_centers(grid.size, device=extent.device).to(extent.dtype) / extent
    return torch.cat([centers, (1 / extent).expand_as(centers)], dim=-1)


@torch.no_grad()
def select_queries(cells: Cells, grids: Sequence[Grid], num_queries: int) -> Tensor:
    """The box logits on which queries start: those of the best cells, local maxima first.

    Args:
        cells: of all levels.
        grids: where they are.
        num_queries: N.

    Returns:
        [B, N, 4], without gradient. An image with fewer unpadded cells than N has the rest on ``spread_points``.
    """
    score = cells.logits.amax(dim=-1).sigmoid().masked_fill(cells.padding, -1.0)  # [B, ΣL]
    each = zip(split_levels(score, grids), grids, strict=True)
    rank = score + torch.cat([is_peak(part, grid.size) for part, grid in each], dim=1)
    # A peak of padding among padding is none.
    best, index = rank.masked_fill(cells.padding, -1.0).topk(min(num_queries, score.shape[1]), dim=1)
    chosen = cells.box_logits.gather(1, index[..., None].expand(-1, -1, 4))
    points = spread_points(num_queries, device=chosen.device, dtype=chosen.dtype)
    start = functional.pad(points.logit(), (0, 2), value=START_SIZE_LOGIT).expand(len(chosen), -1, -1)
    found = chosen.shape[1]
    chosen = torch.where(best[..., None] > -1.0, chosen, start[:, :found])
    return torch.cat([chosen, start[:, found:]], dim=1)


def is_peak(score: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether no cell of the 3 × 3 around it scores higher: [B, H·W] → [B, H·W] bool."""
    maps = score.reshape(-1, 1, *size)
    return score >= functional.max_pool2d(maps, 3, stride=1, padding=1).reshape(score.shape)
