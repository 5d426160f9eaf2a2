"""Encoder and decoder. The decoder is DETR's with one change: each query steers its cross-attention by a Gaussian.

Shape letters: B images, N queries, h heads, d channels a head, C = h·d, L = H·W keys, K classes, M decoder layers.
Names of parameters are the contract with ``smca.reference.model``, which runs on the same state dict.
"""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smca.gpu.attention import smca_attention
from smca.gpu.config import ModelConfig
from smca.gpu.position import sine_of_points

CLASS_PRIOR = 0.01
"""π of docs/method.md §5: the score that every class starts from, so that the focal loss is not drowned by background."""
START_SIZE_LOGIT = -1.5
"""Logit of the width and height of every query's first box: 0.18 of the image."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, n, h·a] → [B, h, n, a]."""
    return x.reshape(*x.shape[:-1], num_heads, -1).transpose(1, 2)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., widths[0]] → [..., widths[-1]]."""
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return cast(Tensor, self.last(x))

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        return cast(nn.Linear, self.layers[-1])


class Attention(nn.Module):
    """Multi-head attention around one of two kernels: plain, or modulated by a Gaussian prior."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        dim = config.hidden_dim
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        prior: tuple[Tensor, Tensor] | None = None,
        size: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """query [B, N, C], key and value [B, L, C], mask [B, L] True = padded, prior (centre, precision) each
        [B, h, N, 2] in cells of a map of `size` → [B, N, C]."""
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (split_heads(x, self.num_heads) for x in projected)
        if prior is not None and size is not None:
            out = smca_attention(q, k, v, *prior, size, key_padding_mask, backend=backend)
        else:
            keep = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual branch and a layer norm after or (pre_norm) before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = Attention(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_dim), nn.LayerNorm(config.hidden_dim)
        self.linear1 = nn.Linear(config.hidden_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.linear2(self.dropout(functional.relu(self.linear1(x))))))

    def forward(self, x: Tensor, pos: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """x and pos [B, L, C], mask [B, L] → [B, L, C]."""
        if self.pre_norm:
            y = self.norm1(x)
            x = x + self.dropout(self.self_attn(y + pos, y + pos, y, key_padding_mask))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self.dropout(self.self_attn(x + pos, x + pos, x, key_padding_mask)))
        out: Tensor = self.norm2(x + self._feed_forward(x))
        return out


class Encoder(nn.Module):
    """A stack of encoder layers; with pre_norm a last layer norm closes it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim) if config.pre_norm else None

    def forward(self, x: Tensor, pos: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """x and pos [B, L, C], mask [B, L] → [B, L, C]."""
        for layer in self.layers:
            x = layer(x, pos, key_padding_mask)
        return x if self.norm is None else self.norm(x)


class Prior(nn.Module):
    """From a query's state to one Gaussian a head: offset of its centre and its precision (docs/method.md §1 and §3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.unit_precision = (config.stride / config.prior_sigma_px) ** 2  # λ at r = 1, in cells⁻²: 2/β
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.offset_head = nn.Linear(config.hidden_dim, 2 * config.num_heads)
        axes = {"fixed": 0, "single": 1, "independent": 2}[config.prior_scale]
        self.scale_head = nn.Linear(config.hidden_dim, axes * config.num_heads) if axes else None

    def reset_parameters(self) -> None:
        """Start the heads as broad Gaussians (r = 1) on a ring of radius 1σ around the reference centre, whatever the query.

        Values carry no position, so it is the difference between heads that look to different sides which tells a query
        where in its neighbourhood the object lies; with all heads on the same spot that has to be learned first.
        """
        nn.init.zeros_(self.offset_head.weight)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        ring = torch.stack([angle.cos(), angle.sin()], dim=-1) / self.unit_precision**0.5  # [h, 2] in cells
        with torch.no_grad():
            self.offset_head.bias.copy_(ring.flatten())
        if self.scale_head is not None:
            nn.init.zeros_(self.scale_head.weight)
            nn.init.ones_(self.scale_head.bias)

    def state(self, content: Tensor, position: Tensor) -> Tensor:
        """O, the layer-normalised sum of a query's content and learned position: [B, N, C]."""
        out: Tensor = self.norm(content + position)
        return out

    def forward(self, state: Tensor, center_cells: Tensor) -> tuple[Tensor, Tensor]:
        """state [B, N, C] and reference centre [B, N, 2] in cells → centre (cells) and precision (cells⁻²), [B, h, N, 2]."""
        offset = split_heads(self.offset_head(state), self.num_heads)  # [B, h, N, 2]
        center = center_cells[:, None] + offset
        if self.scale_head is None:
            return center, torch.full_like(center, self.unit_precision)
        r = split_heads(self.scale_head(state), self.num_heads)  # inverse scale 1/s: 0 is plain attention
        return center, (self.unit_precision * r.square()).expand_as(center)


class DecoderLayer(nn.Module):
    """Self-attention among the queries, (modulated) cross-attention into the image, feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.hidden_dim) for _ in range(3))
        self.linear1 = nn.Linear(config.hidden_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.prior = Prior(config) if config.cross_attention == "smca" else None

    def attend_queries(self, t: Tensor, position: Tensor) -> Tensor:
        """The first block: content t and learned position, both [B, N, C] → [B, N, C]."""
        if self.pre_norm:
            y = self.norm1(t)
            return cast(Tensor, t + self.dropout(self.self_attn(y + position, y + position, y)))
        return cast(Tensor, self.norm1(t + self.dropout(self.self_attn(t + position, t + position, t))))

    def attend_image(
        self,
        t: Tensor,
        position: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        key_padding_mask: Tensor | None,
        prior: tuple[Tensor, Tensor] | None,
        size: tuple[int, int],
        backend: str,
    ) -> Tensor:
        """The second and third block: t [B, N, C] looks into memory [B, L, C] → [B, N, C]."""
        y = self.norm2(t) if self.pre_norm else t
        found = self.cross_attn(y + position, memory_pos, memory, key_padding_mask, prior, size, backend)
        t = t + self.dropout(found)
        if self.pre_norm:
            return t + self._feed_forward(self.norm3(t))
        t = self.norm2(t)
        return cast(Tensor, self.norm3(t + self._feed_forward(t)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.linear2(self.dropout(functional.relu(self.linear1(x))))))


class Decoder(nn.Module):
    """Object queries to logits and boxes, after every layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.box_refinement = config.box_refinement
        self.query_position = nn.Parameter(torch.empty(config.num_queries, dim))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, config.num_classes)
        # One head for all layers, as published. Under refinement a layer's question changes from "where is the box" to "what is
        # wrong with it", which one head cannot answer both of: then each layer has its own.
        self.box_heads = nn.ModuleList(
            MLP(dim, dim, dim, 4) for _ in range(config.decoder_layers if config.box_refinement else 1)
        )
        smca = config.cross_attention == "smca"
        self.center_head = MLP(dim, dim, dim, 2) if smca else None
        self.query_init = config.query_init
        grid = smca and config.query_init == "grid"
        self.query_center = nn.Parameter(torch.empty(config.num_queries, 2)) if grid else None

    def reset_parameters(self) -> None:
        """The starts that matter; everything else is Xavier-uniform (docs/deviations.md)."""
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
        if self.query_center is not None and self.center_head is not None:
            with torch.no_grad():
                self.query_center.copy_(points_xy.logit())
            nn.init.zeros_(self.center_head.last.weight)
            nn.init.zeros_(self.center_head.last.bias)

    def forward(
        self,
        memory: Tensor,
        pos: Tensor,
        key_padding_mask: Tensor | None,
        size: tuple[int, int],
        valid_cells: Tensor,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """memory and pos [B, L, C], mask [B, L], valid_cells [B, 2] = (h, w) of the unpadded image in cells
        → logits [M, B, N, K], boxes [M, B, N, 4] (cxcywh in 0–1 of the unpadded image)."""
        batch = memory.shape[0]
        position = self.query_position.expand(batch, -1, -1)
        t = torch.zeros_like(position)
        memory_pos = memory + pos
        reference_logits = position.new_zeros(*position.shape[:2], 4, dtype=valid_cells.dtype)
        states, refined = [], []
        for index, layer in enumerate(cast("list[DecoderLayer]", self.layers)):
            t = layer.attend_queries(t, position)
            prior = None
            if layer.prior is not None and self.center_head is not None:
                state = layer.prior.state(t, position)
                if index == 0:
                    center_logits = self.center_head(state).to(valid_cells.dtype)
                    if self.query_center is not None:
                        center_logits = center_logits + self.query_center
                    reference_logits = functional.pad(center_logits, (0, 2))  # [ĉ_x, ĉ_y, 0, 0]
                center_cells = reference_logits[..., :2].sigmoid() * valid_cells.flip(-1)[:, None]
                prior = layer.prior(state, center_cells)
            t = layer.attend_image(t, position, memory, memory_pos, key_padding_mask, prior, size, backend)
            states.append(self.norm(t))
            if self.box_refinement:
                refined.append(self.box_heads[index](states[-1]).to(valid_cells.dtype) + reference_logits)
                reference_logits = refined[-1].detach()
        decoded = torch.stack(states)  # [M, B, N, C]
        if self.box_refinement:
            box_logits = torch.stack(refined)
        else:
            box_logits = self.box_heads[0](decoded).to(valid_cells.dtype) + reference_logits
        return self.class_head(decoded), box_logits.sigmoid()


def _spread_points(count: int) -> Tensor:
    """Points (x, y) [count, 2] spread evenly over the unit square: the R2 low-discrepancy sequence, which covers it for
    any count (a lattice would need a square number)."""
    plastic = 1.32471795724474602596  # the real root of x³ = x + 1
    index = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    points = (0.5 + index * torch.tensor([1 / plastic, 1 / plastic**2], dtype=torch.float64)) % 1.0
    return points.clamp(0.02, 0.98)
