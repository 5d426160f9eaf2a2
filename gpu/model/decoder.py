"""The decoder: DETR's with one change: each query steers its cross-attention by a Gaussian (docs/method.md §1 to §5).

Shape letters: B images, N queries, h heads, d channels per head, C = h·d, J levels, ΣL keys of all levels, K classes, M layers.
The names of the parameters are a contract with ``smca.reference.model``, which runs on the same state dict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smca.gpu.attention import Level, multi_scale_smca_attention
from smca.gpu.config import ModelConfig
from smca.gpu.model.layers import (
    MLP,
    Attention,
    Grid,
    feed_forward_block,
    in_full_precision,
    plain_attention,
    split_levels,
)
from smca.gpu.model.position import sine_of_points
from smca.gpu.model.prior import Prior

CLASS_PRIOR = 0.01
"""π of docs/method.md §5: the score that every class starts from, so that the focal loss is not drowned by background."""
START_SIZE_LOGIT = -1.5
"""Logit of the width and height of every query's first box: 0.18 of the image."""


class DecoderLayer(nn.Module):
    """Self-attention among the queries, (modulated) cross-attention into the image, feed-forward."""

    def __init__(self, config: ModelConfig, attention_backend: str) -> None:
        super().__init__()
        self.attention_backend = attention_backend
        dim, levels = config.hidden_dim, len(config.strides)
        self.pre_norm = config.pre_norm
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.linear1 = nn.Linear(dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        self.prior = Prior(config) if config.cross_attention == "smca" else None
        self.level_head = nn.Linear(dim, levels) if levels > 1 and config.scale_selection else None
        self.state_norm = nn.LayerNorm(dim) if self.prior is not None or self.level_head is not None else None

    def attend_queries(self, t: Tensor, position: Tensor) -> Tensor:
        """The first block: content t and learned position, both [B, N, C] → [B, N, C]."""
        if self.pre_norm:
            y = self.norm1(t)
            return cast(Tensor, t + self.dropout(self.self_attn(y + position, y + position, y)))
        return cast(Tensor, self.norm1(t + self.dropout(self.self_attn(t + position, t + position, t))))

    def state(self, t: Tensor, position: Tensor) -> Tensor | None:
        """O, the layer-normalised sum of a query's content and learned position, from which prior and level weights are
        predicted: [B, N, C]; None if neither is predicted."""
        return None if self.state_norm is None else self.state_norm(t + position)

    def attend_image(
        self,
        t: Tensor,
        position: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        grids: Sequence[Grid],
        state: Tensor | None,
        reference_xy: Tensor,
    ) -> Tensor:
        """The second block.

        Args:
            t, position: [B, N, C] content and learned position of the queries.
            memory, memory_pos: [B, ΣL, C] inputs of the values and of the keys.
            grids: the levels' cells.
            state: O of ``state``.
            reference_xy: [B, N, 2] reference centres in 0–1 of the unpadded image.

        Returns:
            [B, N, C].
        """
        y = self.norm2(t) if self.pre_norm else t
        q, k, v = self.cross_attn.project(y + position, memory_pos, memory)
        keys, values = split_levels(k, grids, dim=2), split_levels(v, grids, dim=2)
        weights = self._level_weights(state, q, len(grids))
        if self.prior is not None and state is not None:
            priors = self.prior(state, reference_xy, grids)
            levels = [
                Level(key, value, center, precision, grid.size, grid.key_padding_mask)
                for key, value, (center, precision), grid in zip(keys, values, priors, grids, strict=True)
            ]
            attended = multi_scale_smca_attention(q, levels, weights, backend=self.attention_backend)
        else:
            each = [
                plain_attention(q, key, value, grid.key_padding_mask)
                for key, value, grid in zip(keys, values, grids, strict=True)
            ]
            attended = torch.einsum("jbhnd,bnj->bhnd", torch.stack(each), weights)
        t = t + self.dropout(self.cross_attn.merge(attended))
        return t if self.pre_norm else cast(Tensor, self.norm2(t))

    def feed_forward(self, t: Tensor) -> Tensor:
        """The third block: [B, N, C] → [B, N, C]."""
        if self.pre_norm:
            return t + feed_forward_block(self.norm3(t), self.linear1, self.linear2, self.dropout)
        return cast(Tensor, self.norm3(t + feed_forward_block(t, self.linear1, self.linear2, self.dropout)))

    def _level_weights(self, state: Tensor | None, like: Tensor, levels: int) -> Tensor:
        """α of docs/method.md §4, how much each query takes from each level: [B, N, J]."""
        if self.level_head is None or state is None:
            return like.new_full((like.shape[0], like.shape[2], levels), 1 / levels)
        return cast(Tensor, self.level_head(state).softmax(dim=-1))


class Decoder(nn.Module):
    """Object queries to logits and boxes, after every layer."""

    def __init__(self, config: ModelConfig, attention_backend: str = "auto") -> None:
        """`attention_backend`: of ``smca.gpu.attention.smca_attention``."""
        super().__init__()
        dim = config.hidden_dim
        self.box_refinement = config.box_refinement
        self.query_position = nn.Parameter(torch.empty(config.num_queries, dim))
        self.layers = nn.ModuleList(DecoderLayer(config, attention_backend) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, config.num_classes)
        # One head for all layers, as published. With refinement, the question changes after the first layer from "where is the
        # box" to "what is wrong with it". One head cannot answer both: then each layer has its own.
        self.box_heads = nn.ModuleList(
            MLP(dim, dim, dim, 4) for _ in range(config.decoder_layers if config.box_refinement else 1)
        )
        smca = config.cross_attention == "smca"
        self.center_head = MLP(dim, dim, dim, 2) if smca else None
        self.query_init = config.query_init
        grid = smca and config.query_init == "grid"
        self.query_center = nn.Parameter(torch.empty(config.num_queries, 2)) if grid else None

    def reset_parameters(self) -> None:
        """Set the initial values that matter; everything else is Xavier-uniform (docs/deviations.md)."""
        points_xy = _spread_points(len(self.query_position))
        if self.query_init == "grid":
            with torch.no_grad():
                self.query_position.copy_(sine_of_points(points_xy, self.query_position.shape[1]))
        else:
            nn.init.normal_(self.query_position)
        nn.init.constant_(self.class_head.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
        for index, head in enumerate(self.box_heads):
            last = cast(MLP, head).last
            nn.init.zeros_(last.weight)  # every query starts with the same box around its reference centre
            nn.init.zeros_(last.bias)
            if index == 0:  # later heads correct a box that has its size already
                nn.init.constant_(last.bias[2:], START_SIZE_LOGIT)
        for layer in cast("list[DecoderLayer]", self.layers):
            if layer.prior is not None:
                layer.prior.reset_parameters()
            if layer.level_head is not None:  # every query starts with all levels alike
                nn.init.zeros_(layer.level_head.weight)
                nn.init.zeros_(layer.level_head.bias)
        if self.query_center is not None and self.center_head is not None:
            with torch.no_grad():
                self.query_center.copy_(points_xy.logit())
            nn.init.zeros_(self.center_head.last.weight)
            nn.init.zeros_(self.center_head.last.bias)

    def forward(self, memory: Tensor, pos: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """memory and pos [B, ΣL, C] → logits [M, B, N, K], boxes [M, B, N, 4] (cxcywh in 0–1 of the unpadded image)."""
        position = self.query_position.expand(len(memory), -1, -1)
        dtype = grids[0].valid_cells.dtype  # of boxes and centres: at least float32, also under autocast
        t = torch.zeros_like(position)
        memory_pos = memory + pos
        reference_logits = position.new_zeros(*position.shape[:2], 4, dtype=dtype)
        states, refined = [], []
        for index, layer in enumerate(cast("list[DecoderLayer]", self.layers)):
            t = layer.attend_queries(t, position)
            state = layer.state(t, position)
            if index == 0 and self.center_head is not None and state is not None:
                center_logits = in_full_precision(self.center_head, state).to(dtype)
                if self.query_center is not None:
                    center_logits = center_logits + self.query_center
                reference_logits = functional.pad(center_logits, (0, 2))  # [ĉ_x, ĉ_y, 0, 0]
            reference_xy = reference_logits[..., :2].sigmoid()
            t = layer.attend_image(t, position, memory, memory_pos, grids, state, reference_xy)
            t = layer.feed_forward(t)
            states.append(self.norm(t))
            if self.box_refinement:
                refined.append(
                    (in_full_precision(self.box_heads[index], states[-1]).to(dtype) + reference_logits)[None]
                )
                reference_logits = refined[-1][0].detach()
        decoded = torch.stack(states)  # [M, B, N, C]
        if not self.box_refinement:  # one head decodes all layers at once
            refined = [in_full_precision(self.box_heads[0], decoded).to(dtype) + reference_logits]
        box_logits = torch.cat(refined)
        return self.class_head(decoded), box_logits.sigmoid()


def _spread_points(count: int) -> Tensor:
    """Points (x, y) [count, 2] spread evenly over the unit square: the R2 low-discrepancy sequence, which covers it for
    any count (a lattice would need a square number)."""
    plastic = 1.32471795724474602596  # the real root of x³ = x + 1
    index = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    points = (0.5 + index * torch.tensor([1 / plastic, 1 / plastic**2], dtype=torch.float64)) % 1.0
    return points.clamp(0.02, 0.98)
