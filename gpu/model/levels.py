"""Feature levels: from a backbone's maps to maps of C channels, and the finest one halved behind the encoder (docs/method.md §4;
equations (M1) to (M3) and (M6) of ``smca.reference.model``).

Shape letters: B images, C channels, J levels; a map has (H, W) cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smca.gpu.config import ModelConfig
from smca.gpu.model.layers import Grid, zero_padding


def projections(channels: Sequence[int], config: ModelConfig) -> nn.ModuleList:
    """From each level's features to C channels: a 1×1 convolution. Levels that the backbone lacks are made by 3×3 convolutions of
    stride 2: the first from its last map, any other from the projected level before it."""
    dim, missing = config.hidden_dim, len(config.strides) - len(channels)
    own = [nn.Conv2d(width, dim, kernel_size=1) for width in channels]
    read = [channels[-1], *[dim] * missing][:missing]
    return nn.ModuleList([*own, *(nn.Conv2d(width, dim, kernel_size=3, stride=2, padding=1) for width in read)])


def projected(
    features: Sequence[Tensor], projections: nn.ModuleList, strides: Sequence[int], valid_sizes: Tensor, *, padded: bool
) -> tuple[list[Tensor], list[Grid]]:
    """The maps of all levels, with 0 in padded cells, and where their cells are.

    Args:
        features: the backbone's maps, [B, channels, H, W].
        projections: of ``projections``.
        strides: of the J levels.
        valid_sizes: [B, 2] (height, width) of the unpadded images in pixels.
        padded: False promises that no cell is padding.

    Returns:
        J maps [B, C, H, W], and a grid for each.
    """
    maps: list[Tensor] = []
    grids: list[Grid] = []
    for level, (projection, stride) in enumerate(zip(projections, strides, strict=True)):
        if level < len(features):
            source = features[level]
        else:
            source = zero_padding(features[-1], grids[-1]) if level == len(features) else maps[-1]
        level_map = projection(source)
        grids.append(_grid(valid_sizes / stride, level_map, padded=padded))
        maps.append(zero_padding(level_map, grids[-1]))
    return maps, grids


def halved(level_map: Tensor, grid: Grid, convolution: nn.Module) -> tuple[Tensor, Grid]:
    """A level at twice its stride: [B, C, H, W] → [B, C, ⌈H/2⌉, ⌈W/2⌉], and where its cells are."""
    half = convolution(zero_padding(level_map, grid))
    return half, _grid(grid.valid_cells / 2, half, padded=grid.key_padding_mask is not None)


def _grid(valid_cells: Tensor, level_map: Tensor, *, padded: bool) -> Grid:
    size = (level_map.shape[-2], level_map.shape[-1])
    return Grid(size, valid_cells, _key_padding_mask(valid_cells, size).flatten(1) if padded else None)


def _key_padding_mask(valid_cells: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] bool: a cell is padding if it holds no pixel of the image."""
    height, width = size
    rows = torch.arange(height, device=valid_cells.device) >= valid_cells[:, :1]
    columns = torch.arange(width, device=valid_cells.device) >= valid_cells[:, 1:]
    return rows[:, :, None] | columns[:, None, :]
