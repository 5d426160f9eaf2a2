"""2D sine position encoding (DETR, appendix A.4): `dim`/2 channels of y, then `dim`/2 of x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0
HALF, QUOTIENTS = 5_000_000_000, (7_548_776_662, 5_698_402_910)
"""½, 1/ρ and 1/ρ² to ten digits, ρ the real root of x³ = x + 1."""


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


def sine_encoding_of_pairs(pairs: Tensor, channels: int) -> Tensor:
    """Encoding [..., channels] of pairs [..., 2] in 0–1: of a point (x, y) that of a cell with its centre there, of a size (w, h)
    likewise."""
    return torch.cat([_waves(pairs[..., 1], channels // 2), _waves(pairs[..., 0], channels // 2)], dim=-1)


def map_centers(size: tuple[int, int], *, device: torch.device | None = None) -> Tensor:
    """Centres (x, y) of a map's cells, in cells: [H·W, 2] float32, row-major."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5


def spread_points(count: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points (x, y) [count, 2] spread evenly over the unit square: the R2 low-discrepancy sequence, which covers it for any count
    (a lattice would need a square number). Of whole numbers made on the device: nothing is copied there, and it is exact."""
    n = torch.arange(1, count + 1, device=device)
    x, y = ((HALF + n * quotient) % (2 * HALF) for quotient in QUOTIENTS)
    return (torch.stack([x, y], dim=-1).to(dtype) / (2 * HALF)).clamp(0.02, 0.98)


def _waves(coordinate: Tensor, channels: int) -> Tensor:
    """[...] in 0–1 → [..., channels]: sine and cosine in turn, of ever longer waves."""
    channel = torch.arange(channels, device=coordinate.device)
    wavelength = TEMPERATURE ** (2 * (channel // 2).to(coordinate.dtype) / channels)
    angle = (coordinate * (2 * math.pi))[..., None] / wavelength
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
