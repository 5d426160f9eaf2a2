"""What mixes cells by convolution, with exchange between neighbouring levels: the authors' block, and one besides
(docs/method.md §4; equations (C1) to (C5) of ``smca.reference.encoder_conv``).

Shape letters: B images, C channels, ΣL cells of all levels, one level after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smca.gpu.config import ModelConfig
from smca.gpu.model.layers import Grid, map_of_tokens, split_levels, tokens_of_map, zero_padding

_KERNEL = 7
"""Cells across the authors' kernels."""


class Exchange(nn.Module):
    """The authors' block: a kernel for each level, and what comes of it goes to both neighbours by kernels that all levels share.

    A coarser map is stretched to the size of a finer one, and no cell is masked: what an image gives depends on its padding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, levels = config.hidden_dim, len(config.strides)

        def depthwise(stride: int = 1) -> nn.Conv2d:
            return nn.Conv2d(dim, dim, _KERNEL, stride=stride, padding=_KERNEL // 2, groups=dim)

        self.in_proj = nn.Linear(dim, dim)
        self.own = nn.ModuleList(depthwise() for _ in range(levels))
        self.finer = depthwise(stride=2) if levels > 1 else None
        self.coarser = depthwise() if levels > 1 else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pos: Tensor, grids: Sequence[Grid]) -> Tensor:
        """x and pos [B, ΣL, C] → [B, ΣL, C]."""
        levels = split_levels(self.in_proj(x + pos), grids)
        own = [kernel(map_of_tokens(x, grid)) for kernel, x, grid in zip(self.own, levels, grids, strict=True)]
        mixed = list(own)
        if self.finer is not None and self.coarser is not None:
            for level in range(1, len(own)):
                mixed[level] = mixed[level] + self.finer(own[level - 1])
                stretched = functional.interpolate(
                    self.coarser(own[level]), grids[level - 1].size, mode="bilinear", align_corners=True
                )
                mixed[level - 1] = mixed[level - 1] + stretched
        return cast(Tensor, self.out_proj(torch.cat([tokens_of_map(y) for y in mixed], dim=1)))


class PyramidExchange(nn.Module):
    """Each level takes from itself and from its two neighbours, by depthwise convolutions that all levels share.

    Cells of neighbouring levels correspond by index from the top left corner, so nothing depends on how much padding a batch gives
    an image, and maps need not nest.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.strides = config.strides

        def depthwise() -> nn.Conv2d:
            return nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)

        several = len(config.strides) > 1
        self.own = depthwise()
        self.finer = depthwise() if several else None
        self.coarser = depthwise() if several else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """x [B, ΣL, C] → [B, ΣL, C]."""
        levels = zip(split_levels(x, grids), grids, strict=True)
        maps = [zero_padding(map_of_tokens(tokens, grid), grid) for tokens, grid in levels]
        mixed = []
        for level, grid in enumerate(grids):
            y = self.own(maps[level])
            if self.finer is not None and level > 0:
                ratio = self.strides[level] // self.strides[level - 1]
                fine = functional.conv2d(maps[level - 1], self.finer.weight, stride=ratio, padding=1, groups=y.shape[1])
                y = y + _fit(fine, grid.size)
            if self.coarser is not None and level + 1 < len(grids):
                ratio = self.strides[level + 1] // self.strides[level]
                coarse = self.coarser(maps[level + 1])
                y = y + _fit(coarse.repeat_interleave(ratio, dim=2).repeat_interleave(ratio, dim=3), grid.size)
            mixed.append(tokens_of_map(y))
        return cast(Tensor, self.out_proj(torch.cat(mixed, dim=1)))


def _fit(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H', W'] → [B, C, H, W]: cells beyond `size` dropped, missing ones 0, on the right and below."""
    x = x[:, :, : size[0], : size[1]]
    return functional.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))
