"""The encoder: image features mix, within a level or across levels (docs/method.md §4).

One set of parameters per layer serves all levels, so a single level is simply the case J = 1.

Shape letters: B images, C channels, J levels, ΣL cells of all levels, one level after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smca.gpu.config import ModelConfig
from smca.gpu.model.layers import Attention, Grid, feed_forward_block, joint_padding_mask, plain_attention, split_levels


class Exchange(nn.Module):
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
        maps = [_map_of_tokens(tokens, grid) for tokens, grid in zip(split_levels(x, grids), grids, strict=True)]
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
            mixed.append(y.flatten(2).transpose(1, 2))
        return cast(Tensor, self.out_proj(torch.cat(mixed, dim=1)))


def _map_of_tokens(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, L, C] → [B, C, H, W], padded cells 0."""
    if grid.key_padding_mask is not None:
        tokens = tokens.masked_fill(grid.key_padding_mask[..., None], 0.0)
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid.size)


def _fit(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H', W'] → [B, C, H, W]: cells beyond `size` dropped, missing ones 0, on the right and below."""
    x = x[:, :, : size[0], : size[1]]
    return functional.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))


class EncoderLayer(nn.Module):
    """A mixing block and a feed-forward block, each on a residual branch with a layer norm after or (pre_norm) before it."""

    def __init__(self, config: ModelConfig, *, crosses_levels: bool) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.crosses_levels = crosses_levels
        self.self_attn = Attention(config) if config.encoder == "attention" else None
        self.conv = Exchange(config) if config.encoder == "conv" else None
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_dim), nn.LayerNorm(config.hidden_dim)
        self.linear1 = nn.Linear(config.hidden_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, pos: Tensor, grids: Sequence[Grid]) -> Tensor:
        """x and pos [B, ΣL, C] → [B, ΣL, C]."""
        if self.pre_norm:
            x = x + self.dropout(self._mix(self.norm1(x), pos, grids))
            return x + feed_forward_block(self.norm2(x), self.linear1, self.linear2, self.dropout)
        x = self.norm1(x + self.dropout(self._mix(x, pos, grids)))
        return cast(Tensor, self.norm2(x + feed_forward_block(x, self.linear1, self.linear2, self.dropout)))

    def _mix(self, x: Tensor, pos: Tensor, grids: Sequence[Grid]) -> Tensor:
        if self.conv is not None:
            return cast(Tensor, self.conv(x, grids))  # a convolution knows its neighbours: no position encoding
        assert self.self_attn is not None
        q, k, v = self.self_attn.project(x + pos, x + pos, x)
        if self.crosses_levels or len(grids) == 1:
            return self.self_attn.merge(plain_attention(q, k, v, joint_padding_mask(grids)))
        qs, ks, vs = (split_levels(each, grids, dim=2) for each in (q, k, v))
        each = [
            plain_attention(q, k, v, grid.key_padding_mask) for q, k, v, grid in zip(qs, ks, vs, grids, strict=True)
        ]
        return self.self_attn.merge(torch.cat(each, dim=2))


class Encoder(nn.Module):
    """A stack of encoder layers; with pre_norm, a layer norm follows the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config, crosses_levels=index in config.cross_level_blocks)
            for index in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_dim) if config.pre_norm else None

    def forward(self, x: Tensor, pos: Tensor, grids: Sequence[Grid]) -> Tensor:
        """x and pos [B, ΣL, C] → [B, ΣL, C]."""
        for layer in self.layers:
            x = layer(x, pos, grids)
        return x if self.norm is None else self.norm(x)
