"""Where the cells of a feature level are: which of them hold the image, and the 2D sine encoding of their places.

For an image whose unpadded part is H_px × W_px pixels, and a level with a stride of S pixels per cell:

    (P1) (h, w) = (H_px, W_px) / S                                            the unpadded image in cells, fractional
    (P2) the cell in column i and row j is padded if i ≥ w or j ≥ h           it holds no pixel of the image
    (P3) u_x = 2π·(i + ½)/w          u_y = 2π·(j + ½)/h                       0 to 2π over the unpadded image
    (P4) f_t(u) = sin(u / 10000^(2·⌊t/2⌋/(C/2)))  for even t
                  cos(u / 10000^(2·⌊t/2⌋/(C/2)))  for odd t                   t = 0 … C/2 − 1
    (P5) encoding = [ f_0(u_y) … f_{C/2−1}(u_y), f_0(u_x) … f_{C/2−1}(u_x) ]  y first
    (P6) the same of any two numbers in 0–1: u = 2π·(first, second), second first

DETR's code, and the authors', which is made of it, do (P2) and (P3) otherwise (`padding_cells`, `position_encoding`).
With a map of H × W cells for a batch of images padded to H_all × W_all pixels:

    (P7) the cell in column i and row j is padded if ⌊i·W_all/W⌋ ≥ W_px or ⌊j·H_all/H⌋ ≥ H_px       its nearest pixel is
    (P8) u_x = 2π·(cells from 0 to i of row j that are not padded) / (those of the whole row + 10⁻⁶)
         u_y = 2π·(cells from 0 to j of column i that are not padded) / (those of the whole column + 10⁻⁶)

(P7) is (P2) where the padded size is a multiple of the stride, and for an image alone. (P8) puts a cell at its far edge, and
makes whole cells of the image.

Source of the encoding: DETR, appendix "Spatial positional encoding", with coordinates normalised by the unpadded
image; in (P3) a cell is at its centre, as everywhere else in this package. One place in an image has one encoding, then,
in every level; a learned embedding tells levels apart in the encoder (`model` (M4)).
"""

from typing import NamedTuple

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray, require_shape

TEMPERATURE = 10000.0


class Grid(NamedTuple):
    """The cells of one feature level, for every image of a batch."""

    size: tuple[int, int]
    """(H, W): rows and columns, L = H·W cells, row-major."""
    stride: int
    """Pixels of the network's input a cell."""
    valid_cells: FloatArray
    """[B, 2], (height, width) of the unpadded images in cells, fractional."""
    key_padding_mask: BoolArray
    """[B, L], True where a cell holds no pixel of the image. No image has all its cells padded."""
    position: FloatArray
    """[B, L, C], what is added to queries and keys so that they know their place, and in which level it is."""


def key_padding_mask(valid_cells: FloatArray, size: tuple[int, int]) -> BoolArray:
    """[B, H·W], True where a cell holds no pixel of the image. Equation (P2).

    Args:
        valid_cells: [B, 2], (height, width) of the unpadded image in cells, fractional.
        size: (H, W) of the map.

    An image one cell high and 1½ wide, on a map of 2 × 3: its second column is half covered, and so not padded.

    >>> key_padding_mask(np.array([[1.0, 1.5]]), (2, 3)).astype(int).tolist()
    [[0, 0, 1, 1, 1, 1]]
    """
    height, width = size
    row_padded = np.arange(height) >= valid_cells[:, :1]  # [B, H]
    column_padded = np.arange(width) >= valid_cells[:, 1:]  # [B, W]
    return (row_padded[:, :, None] | column_padded[:, None, :]).reshape(-1, height * width)


def nearest_padding_mask(valid_sizes: FloatArray, padded_size: tuple[int, int], size: tuple[int, int]) -> BoolArray:
    """[B, H·W], True where the pixel that is nearest to a cell, as DETR's code has it, is padding. Equation (P7).

    Args:
        valid_sizes: [B, 2], (height, width) of the unpadded images in pixels.
        padded_size: (height, width) of the padded images in pixels.
        size: (H, W) of the map.

    An image 25 pixels wide beside one of 65, on three cells: they read pixels 0, 21 and 43. The second, at a stride of 32,
    holds nothing of the image, and still counts:

    >>> nearest_padding_mask(np.array([[32.0, 25.0]]), (32, 65), (1, 3)).astype(int).tolist()
    [[0, 0, 1]]
    """
    height, width = size
    row_padded = np.arange(height) * padded_size[0] // height >= valid_sizes[:, :1]  # [B, H]
    column_padded = np.arange(width) * padded_size[1] // width >= valid_sizes[:, 1:]  # [B, W]
    return (row_padded[:, :, None] | column_padded[:, None, :]).reshape(-1, height * width)


def counted_position_encoding(padding_mask: BoolArray, size: tuple[int, int], channels: int) -> FloatArray:
    """The encoding of every cell as DETR's code has it. Equations (P8), (P4), (P5).

    Args:
        padding_mask: [B, H·W], True = padded.
        size: (H, W) of the map.
        channels: C, a multiple of 4.

    Returns:
        [B, H·W, C], row-major; finite in padded cells too.

    Of two cells side by side, u_x is π and 2π, so the x half, (sin, cos), is (0, −1) and (0, 1):

    >>> (counted_position_encoding(np.zeros((1, 2), bool), (1, 2), 4)[0, :, 2:].round(5) + 0.0).tolist()
    [[0.0, -1.0], [0.0, 1.0]]
    """
    shown = ~padding_mask.reshape(-1, *size)  # [B, H, W]
    halves = []
    for axis in (1, 2):  # y first
        counts = np.cumsum(shown, axis=axis)
        whole = counts.max(axis=axis, keepdims=True)
        halves.append(_waves(2 * np.pi * counts / (whole + 1e-6), channels // 2))  # (P8) [B, H, W, C/2]
    return np.concatenate(halves, axis=-1).reshape(len(shown), size[0] * size[1], channels)


def sine_position_encoding(size: tuple[int, int], valid_cells: FloatArray, channels: int) -> FloatArray:
    """The encoding of every cell of every image. Equations (P3) to (P5); method.md, Notation (cell centres).

    Args:
        size: (H, W) of the map.
        valid_cells: [B, 2], (height, width) of the unpadded image in cells, fractional, > 0.
        channels: C, a multiple of 4: sine and cosine of y and of x.

    Returns:
        [B, H·W, C], row-major; finite in padded cells too.

    Raises:
        ValueError: another number of channels, or a valid_cells of another shape.

    One cell, C = 4: u = 2π·½ = π in both directions, and t = 0, 1 have no divisor. sin π = 0, cos π = −1:

    >>> (sine_position_encoding((1, 1), np.array([[1.0, 1.0]]), 4).round(12) + 0.0).tolist()
    [[[0.0, -1.0, 0.0, -1.0]]]

    Two cells side by side: u_x is ½π and 1½π, so the x half, (sin, cos), is (1, 0) and (−1, 0):

    >>> (sine_position_encoding((1, 2), np.array([[1.0, 2.0]]), 4)[0, :, 2:].round(12) + 0.0).tolist()
    [[1.0, 0.0], [-1.0, 0.0]]
    """
    if channels < 4 or channels % 4 != 0:
        raise ValueError(f"channels: expected a multiple of 4 (sine and cosine of y and of x), got {channels}.")
    require_shape("valid_cells", valid_cells, (None, 2), "Give (height, width) in cells, one row per image.")
    height, width = size
    half = channels // 2
    batch = valid_cells.shape[0]
    angle_y = 2 * np.pi * (np.arange(height) + 0.5) / valid_cells[:, :1]  # (P3) [B, H]
    angle_x = 2 * np.pi * (np.arange(width) + 0.5) / valid_cells[:, 1:]  # (P3) [B, W]
    encoded_y = np.broadcast_to(_waves(angle_y, half)[:, :, None, :], (batch, height, width, half))
    encoded_x = np.broadcast_to(_waves(angle_x, half)[:, None, :, :], (batch, height, width, half))
    return np.concatenate([encoded_y, encoded_x], axis=-1).reshape(batch, height * width, channels)  # (P5)


def sine_encoding_of_pairs(pairs: FloatArray, channels: int) -> FloatArray:
    """The encoding of places, or of sizes. Equation (P6): [..., 2] in 0–1 → [..., C].

    A point (x, y) gets what a cell with its centre there has; a size (w, h) is encoded in the same way.

    >>> (sine_encoding_of_pairs(np.array([0.5, 0.25]), 4).round(12) + 0.0).tolist()
    [1.0, 0.0, 0.0, -1.0]
    """
    waves = _waves(2 * np.pi * pairs, channels // 2)  # [..., 2, C/2]
    return np.concatenate([waves[..., 1, :], waves[..., 0, :]], axis=-1)


def map_centers(size: tuple[int, int]) -> FloatArray:
    """Centres (x, y) of a map's cells, in cells, [H·W, 2], row-major: (i + ½, j + ½).

    >>> map_centers((1, 2)).tolist()
    [[0.5, 0.5], [1.5, 0.5]]
    """
    height, width = size
    y, x = np.mgrid[:height, :width]
    return np.stack([x.ravel(), y.ravel()], axis=-1) + 0.5


def _waves(angle: FloatArray, channels: int) -> FloatArray:
    """[..., ] → [..., channels]: equation (P4)."""
    t = np.arange(channels)
    scaled = angle[..., None] / TEMPERATURE ** (2 * (t // 2) / channels)
    return np.where(t % 2 == 0, np.sin(scaled), np.cos(scaled))
