"""Feature levels: from a backbone's maps to maps of C channels, and the finest one halved behind the encoder (docs/method.md §4;
equations (M1) to (M3) and (M6) of ``smca.reference.model``).

Shape letters: B images, C channels, J levels; a map has (H, W) cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from smca.gpu.config import ModelConfig
from smca.gpu.model.layers import Grid, zero_padding
from smca.gpu.model.position import covered_padding_mask, nearest_padding_mask


def projections(channels: Sequence[int], config: ModelConfig) -> nn.ModuleList:
    """From each level's features to C channels: a 1×1 convolution. Levels that the backbone lacks are made by 3×3 convolutions of
    stride 2: the first from its last map, any other from the projected level before it."""
    dim, missing = config.hidden_dim, len(config.strides) - len(channels)
    own = [nn.Conv2d(width, dim, kernel_size=1) for width in channels]
    read = [channels[-1], *[dim] * missing][:missing]
    return nn.ModuleList([*own, *(nn.Conv2d(width, dim, kernel_size=3, stride=2, padding=1) for width in read)])


@dataclass(frozen=True)
class Extent:
    """How far the images of a batch reach."""

    valid_sizes: Tensor
    """[B, 2] (height, width) of the unpadded images in pixels."""
    padded: bool = True
    """False promises that no cell is padding."""
    padded_size: tuple[int, int] | None = None
    """(height, width) in pixels that they were padded to, if cells are padding as their nearest pixels are; otherwise those are
    that hold no pixel of the image."""

    def grid(self, stride: int, level_map: Tensor) -> Grid:
        """Where the cells of a map [B, C, H, W] are."""
        size, valid_cells = (level_map.shape[-2], level_map.shape[-1]), self.valid_sizes / stride
        if not self.padded:
            return Grid(size, valid_cells, None)
        if self.padded_size is None:
            return Grid(size, valid_cells, covered_padding_mask(valid_cells, size).flatten(1))
        return Grid(size, valid_cells, nearest_padding_mask(self.valid_sizes, self.padded_size, size).flatten(1))


def projected(
    features: Sequence[Tensor], projections: nn.ModuleList, strides: Sequence[int], extent: Extent
) -> tuple[list[Tensor], list[Grid]]:
    """The maps of all levels, with 0 in padded cells, and where their cells are.

    Args:
        features: the backbone's maps, [B, channels, H, W].
        projections: of ``projections``.
        strides: of the J levels.
        extent: of the images.

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
        grids.append(extent.grid(stride, level_map))
        maps.append(zero_padding(level_map, grids[-1]))
    return maps, grids


def halved(level_map: Tensor, grid: Grid, convolution: nn.Module, stride: int, extent: Extent) -> tuple[Tensor, Grid]:
    """A level at twice its stride, `stride`: [B, C, H, W] → [B, C, ⌈H/2⌉, ⌈W/2⌉], and where its cells are."""
    half = convolution(zero_padding(level_map, grid))
    return half, extent.grid(stride, half)
