"""The decoder: DETR's with one change: each query steers its cross-attention by a Gaussian (docs/method.md §1 to §5).

Shape letters: B images, N queries, h heads, d channels per head, C = h·d, J levels, ΣL keys of all levels, K classes, M layers.
The names of the parameters are a contract with ``smca.reference.model``, which runs on the same state dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smca.gpu.attention import Level, multi_scale_smca_attention
from smca.gpu.config import ModelConfig
from smca.gpu.model.denoising import FurtherQueries
from smca.gpu.model.dense_head import START_SIZE_LOGIT
from smca.gpu.model.layers import (
    MLP,
    Attention,
    Grid,
    feed_forward_block,
    in_full_precision,
    plain_attention,
    set_class_prior,
    split_levels,
)
from smca.gpu.model.position import sine_encoding_of_pairs, spread_points
from smca.gpu.model.prior import Prior

LABEL_EMBED_STD = 0.5
"""Of the contents that noised queries start from."""


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

    def attend_queries(self, t: Tensor, position: Tensor, sees: Tensor | None = None) -> Tensor:
        """The first block: content t and position, both [B, N, C] → [B, N, C]; sees [B, N, N] bool: who attends to whom."""
        y = self.norm1(t) if self.pre_norm else t
        t = t + self.dropout(self.self_attn(y + position, y + position, y, sees=sees))
        return t if self.pre_norm else cast(Tensor, self.norm1(t))

    def state(self, t: Tensor, position: Tensor) -> Tensor | None:
        """O, the layer-normalised sum of a query's content and position, from which prior and level weights are
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
        reference: Tensor,
    ) -> Tensor:
        """The second block.

        Args:
            t, position: [B, N, C] content and position of the queries.
            memory, memory_pos: [B, ΣL, C] inputs of the values and of the keys.
            grids: the levels' cells.
            state: O of ``state``.
            reference: [B, N, 4] reference boxes, cxcywh in 0–1 of the unpadded image.

        Returns:
            [B, N, C].
        """
        y = self.norm2(t) if self.pre_norm else t
        q, k, v = self.cross_attn.project(y + position, memory_pos, memory)
        keys, values = split_levels(k, grids, dim=2), split_levels(v, grids, dim=2)
        weights = self._level_weights(state, q, len(grids))
        if self.prior is not None and state is not None:
            priors = self.prior(state, reference, grids)
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
        self.num_queries, self.query_init = config.num_queries, config.query_init
        self.class_scores = config.class_scores
        self.box_refinement, self.has_anchors = config.box_refinement, config.has_anchors
        self.prior_state, self.initialization = config.prior_state, config.initialization
        # Queries: learned positions, with reference centres from the first layer's state; or boxes, and what is made of them.
        self.query_position = self.center_head = self.query_center = None
        self.query_anchor = self.query_content = self.box_position = self.label_embed = None
        if self.has_anchors:
            self.query_content = nn.Parameter(torch.empty(config.num_queries, dim))
            self.box_position = MLP(2 * dim, dim, dim)
            if config.query_init == "anchors":
                self.query_anchor = nn.Parameter(torch.empty(config.num_queries, 4))
            if config.denoising_groups:
                self.label_embed = nn.Parameter(torch.empty(config.num_classes, dim))
        else:
            self.query_position = nn.Parameter(torch.empty(config.num_queries, dim))
        self.layers = nn.ModuleList(DecoderLayer(config, attention_backend) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, config.class_outputs)
        # One head for all layers, as published. With refinement, the question changes after the first layer from "where is the
        # box" to "what is wrong with it". One head cannot answer both: then each layer has its own.
        self.box_heads = nn.ModuleList(
            MLP(dim, dim, dim, 4) for _ in range(config.decoder_layers if config.box_refinement else 1)
        )
        if config.cross_attention == "smca" and not self.has_anchors:
            self.center_head = MLP(dim, dim, dim, 2)
            if config.query_init == "grid":
                self.query_center = nn.Parameter(torch.empty(config.num_queries, 2))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values that matter; everything else is Xavier-uniform (docs/deviations.md)."""
        if self.initialization == "published":
            self._reset_as_published()
            return
        points_xy = spread_points(self.num_queries)
        if self.query_position is not None and self.query_init == "grid":
            self.query_position.copy_(sine_encoding_of_pairs(points_xy, self.query_position.shape[1]))
        elif self.query_position is not None:
            nn.init.normal_(self.query_position)
        if self.query_center is not None and self.center_head is not None:
            self.query_center.copy_(points_xy.logit())
            nn.init.zeros_(self.center_head.last.weight)
            nn.init.zeros_(self.center_head.last.bias)
        if self.query_anchor is not None:
            self.query_anchor.copy_(functional.pad(points_xy.logit(), (0, 2), value=START_SIZE_LOGIT))
        if self.query_content is not None and self.box_position is not None:
            nn.init.zeros_(self.query_content)
            nn.init.zeros_(self.box_position.last.weight)  # a query's position is that of its centre at first
            nn.init.zeros_(self.box_position.last.bias)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed, std=LABEL_EMBED_STD)
        if self.class_scores == "sigmoid":  # a softmax starts from PyTorch's bias, as in DETR
            set_class_prior(self.class_head)
        for index, head in enumerate(self.box_heads):
            last = cast(MLP, head).last
            nn.init.zeros_(
                last.weight
            )  # every query starts with the same box around its reference centre, or with its own
            nn.init.zeros_(last.bias)
            if index == 0 and not self.has_anchors:  # later heads, and anchors, have a size already
                nn.init.constant_(last.bias[2:], START_SIZE_LOGIT)
        for layer in cast("list[DecoderLayer]", self.layers):
            if layer.prior is not None:
                layer.prior.reset_parameters()
            if layer.level_head is not None:  # every query starts with all levels alike
                nn.init.zeros_(layer.level_head.weight)
                nn.init.zeros_(layer.level_head.bias)

    def _reset_as_published(self) -> None:
        """What the authors' code draws: heads as PyTorch does by itself, not Xavier's; no ring of offsets, no first box."""
        assert self.query_position is not None
        nn.init.normal_(self.query_position)
        for head in (self.class_head, *(layer for mlp in self.box_heads for layer in cast(MLP, mlp).layers)):
            cast(nn.Linear, head).reset_parameters()
        if self.class_scores == "sigmoid":
            set_class_prior(self.class_head)
        for layer in cast("list[DecoderLayer]", self.layers):
            if layer.prior is not None:
                layer.prior.reset_parameters()

    def forward(
        self,
        memory: Tensor,
        pos: Tensor,
        grids: Sequence[Grid],
        selected: Tensor | None = None,
        further: FurtherQueries | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All layers and their decoded outputs.

        Args:
            memory, pos: [B, ΣL, C] the encoder's output, and what to add to it in keys.
            grids: the levels' cells.
            selected: [B, N, 4] box logits that queries start on, with query_init="selected".
            further: D queries more per image, which do not see the others, nor are seen by them; N stands for N + D below.

        Returns:
            The class head's outputs [M, B, N, K], or [M, B, N, K + 1] with class_scores="softmax", and boxes [M, B, N, 4]
            (cxcywh in 0–1 of the unpadded image).
        """
        dtype = grids[0].valid_cells.dtype  # of boxes and centres: at least float32, also under autocast
        t, reference_logits = self._first_queries(len(memory), dtype, selected)
        sees = None
        if further is not None:
            assert self.label_embed is not None
            t = torch.cat([t, functional.embedding(further.labels, self.label_embed)], dim=1)
            reference_logits = torch.cat([reference_logits, further.box_logits.to(dtype)], dim=1)
            sees = joined_sight(self.num_queries, further.sees)
        memory_pos = memory + pos
        states, refined = [], []
        for index, layer in enumerate(cast("list[DecoderLayer]", self.layers)):
            position = self._position(reference_logits)
            entering = t
            t = layer.attend_queries(t, position, sees)
            state = layer.state(entering if self.prior_state == "entering" else t, position)
            if index == 0 and self.center_head is not None and state is not None:
                center_logits = in_full_precision(self.center_head, state).to(dtype)
                if self.query_center is not None:
                    center_logits = center_logits + self.query_center
                reference_logits = functional.pad(center_logits, (0, 2))  # [ĉ_x, ĉ_y, 0, 0]
            # What a query is moved by learns; the box that it has is taken as given, by its prior as by its position.
            reference = (reference_logits.detach() if self.has_anchors else reference_logits).sigmoid()
            t = layer.attend_image(t, position, memory, memory_pos, grids, state, reference)
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

    def _first_queries(self, batch: int, dtype: torch.dtype, selected: Tensor | None) -> tuple[Tensor, Tensor]:
        """What queries begin with: content [B, N, C] and logits of their reference boxes [B, N, 4]."""
        if self.query_content is None:
            assert self.query_position is not None
            position = self.query_position.expand(batch, -1, -1)
            return torch.zeros_like(position), position.new_zeros(*position.shape[:2], 4, dtype=dtype)
        anchors = self.query_anchor if selected is None else selected
        assert anchors is not None
        return self.query_content.expand(batch, -1, -1), anchors.to(dtype).expand(batch, -1, -1)

    def _position(self, reference_logits: Tensor) -> Tensor:
        """[B, N, 4] → [B, N, C]: learned for each query, or made of its box."""
        if self.query_position is not None:
            return self.query_position.expand(len(reference_logits), -1, -1)
        assert self.box_position is not None
        channels, box = self.norm.normalized_shape[0], reference_logits.detach().sigmoid()
        center, size = (sine_encoding_of_pairs(pair, channels) for pair in (box[..., :2], box[..., 2:]))
        return center + cast(Tensor, self.box_position(torch.cat([center, size], dim=-1)))


def joined_sight(num_queries: int, sees: Tensor) -> Tensor:
    """Who attends to whom among N queries, which all see each other, and D further ones: [B, D, D] → [B, N + D, N + D] bool."""
    own = torch.ones(num_queries, num_queries, dtype=torch.bool, device=sees.device).expand(len(sees), -1, -1)
    rest = sees.shape[1]
    return torch.cat([functional.pad(own, (0, rest)), functional.pad(sees, (num_queries, 0))], dim=1)
