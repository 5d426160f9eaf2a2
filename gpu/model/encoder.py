"""The encoder: image features mix, within a level or across levels (docs/method.md §4).

One set of parameters per layer serves all levels (but for the kernels "own" of encoder="conv"), so a single level is simply the
case J = 1.

Shape letters: B images, C channels, J levels, ΣL cells of all levels, one level after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from smca.gpu.config import ModelConfig
from smca.gpu.model.encoder_conv import Exchange, PyramidExchange
from smca.gpu.model.layers import Attention, Grid, feed_forward_block, joint_padding_mask, plain_attention, split_levels


class EncoderLayer(nn.Module):
    """A mixing block and a feed-forward block, each on a residual branch with a layer norm after or (pre_norm) before it."""

    def __init__(self, config: ModelConfig, *, crosses_levels: bool) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.crosses_levels = crosses_levels
        self.self_attn = Attention(config) if config.encoder == "attention" else None
        self.conv: Exchange | PyramidExchange | None = None
        if config.encoder != "attention":
            self.conv = Exchange(config) if config.encoder == "conv" else PyramidExchange(config)
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
        if isinstance(self.conv, Exchange):
            return cast(Tensor, self.conv(x, pos, grids))
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
