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


def counted_position_encoding(
    padding_mask: Tensor, size: tuple[int, int], channels: int, *, dtype: torch.dtype
) -> Tensor:
    """Encoding [B, H·W, channels] of the cells of a map as DETR's code has it: of how many cells that are not padding there are up
    to a cell in its column and row, over all that there are, plus 10⁻⁶. padding_mask [B, H·W] bool, True = padded."""
    shown = (~padding_mask).reshape(-1, *size).to(dtype)
    halves = []
    for axis in (1, 2):  # y first
        # Images lie in the top left corner: their cells are counted without a sum over cells, which on a GPU has no fixed order.
        whole = shown.sum(axis, keepdim=True)
        shape = [1, -1, 1] if axis == 1 else [1, 1, -1]
        number = torch.arange(1, shown.shape[axis] + 1, device=shown.device).to(dtype).view(shape)
        halves.append(_waves(torch.minimum(number, whole) / (whole + 1e-6), channels // 2))
    return torch.cat(halves, dim=-1).flatten(1, 2)


def covered_padding_mask(valid_cells: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] bool: a cell is padding if it holds no pixel of the image; valid_cells [B, 2] = (h, w) of that in cells."""
    height, width = size
    rows = torch.arange(height, device=valid_cells.device) >= valid_cells[:, :1]
    columns = torch.arange(width, device=valid_cells.device) >= valid_cells[:, 1:]
    return rows[:, :, None] | columns[:, None, :]


def nearest_padding_mask(valid_sizes: Tensor, padded_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[B, H, W] bool: a cell is padding if its nearest pixel is, as DETR's code has it; valid_sizes [B, 2] and padded_size are
    (height, width) of the images without and with their padding, in pixels."""
    rows, columns = (
        torch.arange(cells, device=valid_sizes.device) * padded_size[axis] // cells >= valid_sizes[:, axis, None]
        for axis, cells in enumerate(size)
    )
    return rows[:, :, None] | columns[:, None, :]


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
