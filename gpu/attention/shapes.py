"""Common to all ways to compute SMCA attention: shape checks, the cells of a map, and whether autocast is on."""

from __future__ import annotations

import torch
from torch import Tensor

PADDED_LOGIT = -1e30
"""Logit that the lifted form gives padded keys: exp underflows to exactly 0 beside any real logit, while 0·(−1e30) stays 0
(−inf would turn it into NaN). Representable in bfloat16, float32 and float64."""


def cell_centers(size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (x, y), each [H·W], of the cells of a map in cells: cell (column i, row j) is at (i + ½, j + ½)."""
    height, width = size
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    return x.repeat(height), y.repeat_interleave(width)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on; False for devices without autocast, such as "meta"."""
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


# Asked once, here: PyTorch 2.11 cannot trace the question.
_WITH_AUTOCAST = {device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)}


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument whose shape does not fit the others; arguments of ``smca_attention``."""
    if q.dim() != 4:
        raise ValueError(f"q must be [B, h, N, d], got shape {tuple(q.shape)}")
    batch, heads, queries, channels = q.shape
    keys = size[0] * size[1]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "k": (k, (batch, heads, keys, channels)),
        "v": (v, (batch, heads, keys, channels)),
        "center_xy": (center_xy, (batch, heads, queries, 2)),
        "precision_xy": (precision_xy, (batch, heads, queries, 2)),
    }
    if key_padding_mask is not None:
        expected["key_padding_mask"] = (key_padding_mask, (batch, keys))
        if key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"key_padding_mask must be bool (True = padded), got {key_padding_mask.dtype}: use .bool()"
            )
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with q {tuple(q.shape)} and size (H, W) = {tuple(size)}, "
                f"got {tuple(tensor.shape)}"
            )
