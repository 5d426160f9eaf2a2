"""2D sine position encoding (DETR, appendix A.4): `dim`/2 channels of y, then `dim`/2 of x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_position_encoding(size: tuple[int, int], valid_cells: Tensor, channels: int) -> Tensor:
    """Encoding [B, H·W, channels] of the cells of a map.

    A cell's coordinate is its centre over the unpadded extent; valid_cells [B, 2] = (h, w) of the unpadded image in cells.
    """
    height, width = size
    y = (torch.arange(height, device=valid_cells.device) + 0.5).to(valid_cells) / valid_cells[:, :1]
    x = (torch.arange(width, device=valid_cells.device) + 0.5).to(valid_cells) / valid_cells[:, 1:]
    rows = _waves(y, channels // 2)[:, :, None].expand(-1, -1, width, -1)
    columns = _waves(x, channels // 2)[:, None].expand(-1, height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(1, 2)


def sine_of_points(points_xy: Tensor, dim: int) -> Tensor:
    """Encoding [N, dim] of points (x, y) [N, 2] in 0–1 of the image: the encoding that a cell at that place would have."""
    return torch.cat([_waves(points_xy[:, 1], dim // 2), _waves(points_xy[:, 0], dim // 2)], dim=-1)


def _waves(coordinate: Tensor, channels: int) -> Tensor:
    """[...] in 0–1 → [..., channels]: sine and cosine in turn, of ever longer waves."""
    channel = torch.arange(channels, device=coordinate.device)
    wavelength = TEMPERATURE ** (2 * (channel // 2).to(coordinate.dtype) / channels)
    angle = (coordinate * (2 * math.pi))[..., None] / wavelength
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
