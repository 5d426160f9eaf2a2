"""The decoder: where object queries meet the image, and the only place in which SMCA differs from DETR.

t [B, N, C] is the queries' content, 0 at first; p [N, C] their learned position; x_j [B, L_j, C] the encoded cells of
level j and pos_j their position; A multi-head self-attention, X cross-attention, ffn the feed-forward network. A layer
is

    (D1) post-norm   t = norm1(t + A(t + p, t + p, t))
                     O = state_norm(t + p)
                     t = norm2(t + X(t + p, x + pos, x));   t = norm3(t + ffn(t))
         pre-norm    y = norm1(t);   t = t + A(y + p, y + p, y)
                     O = state_norm(t + p)
                     y = norm2(t);   t = t + X(y + p, x + pos, x);   t = t + ffn(norm3(t))

In the authors' code O is made first, of the t that enters the layer (`prior_state="entering"`).

With SMCA, X is modulated by one Gaussian per query, head i and level j, made from the query's state O (`prior` (D3) to (D5)):

    (D2) ref    = [ĉ_x, ĉ_y, 0, 0],   ĉ = center_head(O of the first layer) (+ query_center)      logits, for all layers
    (D6) α      = softmax over levels of level_head(O)       one for all heads (method.md §4); 1/J without scale selection
    (D7) X_i    = Σ_j α_j·smca_attention(q_i, k_ij, v_ij, c_ij, λ_ij)        λ = 0, and ref = 0 at first, if "dense"

One level is the case J = 1: α = 1, and there is no level head. A plain DETR has no head that reads O, so no state_norm.
After every layer, heads decode it, the same ones for all (method.md §5; paper, "SMCA box prediction"):

    (D8) D = norm(t);   z = class_head(D);   box logits = box_head(D) + ref;   box = σ(box logits)
    (D9) with box refinement, every layer has a box_head of its own, and the next layer's ref = this layer's box logits
         (no gradient passes there in training)

Without refinement, (D2) is the published method: one reference centre from the first layer, reused by all. What
changes from layer to layer then is O, and so offsets, scales and level weights.

Beyond the paper, a query has a box from the start (`query_init` "anchors" or "selected"): ref holds the logits of its
four numbers in every layer, there is no center_head, and p and t are made of it. Its p is another in every layer:

    (D10) ref = query_anchor, or as selected (`dense_head` (H6));   t = query_content at first
    (D11) p   = sine(σ(ref)_xy) + box_position([sine(σ(ref)_xy), sine(σ(ref)_wh)])      sine: `position` (P6)

Position and prior take ref as given: no gradient passes through them to it (query_anchor learns from the boxes that
are predicted from it, (D8)). A query whose box is known can then look as far as that box reaches. Sources: DAB-DETR,
arXiv 2201.12329, section 4, for (D10) and (D11).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray, IntArray
from smca.reference.attention import Level, multi_scale_smca_attention
from smca.reference.config import ModelConfig, has_anchors, selects_scales, uses_prior
from smca.reference.layers import (
    Params,
    feed_forward,
    layer_norm,
    linear,
    merge_heads,
    mlp,
    multi_head_attention,
    sigmoid,
    softmax,
    split_heads,
)
from smca.reference.position import Grid, sine_encoding_of_pairs
from smca.reference.prior import spatial_prior


class FurtherQueries(NamedTuple):
    """D queries per image beside the model's own, which training adds: beyond the paper, `denoising`."""

    box_logits: FloatArray
    """[B, D, 4], their ref."""
    labels: IntArray
    """[B, D], their t is label_embed[label]."""
    sees: BoolArray
    """[B, D, D]: True where the first attends to the second. The model's own queries and these don't see each other."""


def decoder(
    memory: Sequence[FloatArray],
    grids: Sequence[Grid],
    params: Params,
    config: ModelConfig,
    selected: FloatArray | None = None,
    further: FurtherQueries | None = None,
    given: Sequence[FloatArray] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """All layers and their decoded outputs. Equations (D1), (D2), (D8) to (D11).

    Args:
        memory: the encoder's output, J arrays [B, L_j, C].
        grids: where their cells are.
        params: with the names of `parameters.parameter_shapes`.
        config: as configured.
        selected: with query_init="selected" the box logits that queries start on, [B, N, 4].
        further: D queries more per image, as in training; N stands for N + D below.
        given: M arrays [B, N, 4], the ref of each layer wherever it is taken as given, (D9) and (D10): what a gradient does
            not pass through. None = those that the layers compute, which are the same numbers.

    Returns:
        z [M, B, N, K], or [M, B, N, K + 1] with class_scores="softmax"; boxes [M, B, N, 4] (cxcywh in [0, 1] of the
        unpadded image).
    """
    t, reference_logits = initial_queries(memory[0].shape[0], params, config, selected)  # [B, N, C], ref [B, N, 4]
    sees = None
    if further is not None:
        t = np.concatenate([t, params["decoder.label_embed"][further.labels]], axis=1)
        reference_logits = np.concatenate([reference_logits, further.box_logits], axis=1)
        sees = joined_sight(config.num_queries, further.sees)
    layer_outputs, layer_boxes = [], []

    for index in range(config.decoder_layers):
        name = f"decoder.layers.{index}"
        if given is not None and config.box_refinement and index > 0:
            reference_logits = given[index]  # (D9)
        looked_at = reference_logits if given is None else given[index]
        query_position = position_of_queries(looked_at, params, config)  # p

        state = t + query_position
        y = layer_norm(t, params, f"{name}.norm1") if config.pre_norm else t
        q = k = y + query_position
        t = t + multi_head_attention(q, k, y, params, f"{name}.self_attn", config.num_heads, sees=sees)
        if not config.pre_norm:
            t = layer_norm(t, params, f"{name}.norm1")

        if config.prior_state == "attended":
            state = t + query_position
        if uses_prior(config) or selects_scales(config):
            state = layer_norm(state, params, f"{name}.state_norm")  # O
        if uses_prior(config) and index == 0 and not has_anchors(config):
            reference_logits[..., :2] = initial_center_logits(state, params, config)
        looked_at = looked_at if has_anchors(config) else reference_logits
        priors = spatial_prior(state, looked_at, grids, params, name, config)
        level_weights = scale_selection(state, params, name, config)

        y = layer_norm(t, params, f"{name}.norm2") if config.pre_norm else t
        t = t + cross_attention(
            y + query_position, memory, grids, priors, level_weights, params, f"{name}.cross_attn", config
        )
        if config.pre_norm:
            t = t + feed_forward(layer_norm(t, params, f"{name}.norm3"), params, name)
        else:
            t = layer_norm(t, params, f"{name}.norm2")
            t = layer_norm(t + feed_forward(t, params, name), params, f"{name}.norm3")

        decoded = layer_norm(t, params, "decoder.norm")  # D
        box_head = index if config.box_refinement else 0  # one for all, unless each layer corrects the one before
        box_logits = mlp(decoded, params, f"decoder.box_heads.{box_head}") + reference_logits
        layer_outputs.append(linear(decoded, params, "decoder.class_head"))
        layer_boxes.append(sigmoid(box_logits))
        if config.box_refinement:
            reference_logits = box_logits  # (D9)

    return np.stack(layer_outputs), np.stack(layer_boxes)


def initial_queries(
    batch: int, params: Params, config: ModelConfig, selected: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """What queries begin with: t [B, N, C] and ref [B, N, 4]. Zeros as published; otherwise equation (D10)."""
    shape = (batch, config.num_queries)
    if not has_anchors(config):
        return np.zeros((*shape, config.hidden_dim)), np.zeros((*shape, 4))
    anchors = params["decoder.query_anchor"] if selected is None else selected
    content = params["decoder.query_content"]
    return np.broadcast_to(content, (*shape, config.hidden_dim)), np.broadcast_to(anchors, (*shape, 4))


def position_of_queries(reference_logits: FloatArray, params: Params, config: ModelConfig) -> FloatArray:
    """p: learned, [N, C], the same in every layer and image; or, with a box per query, [B, N, C]. Equation (D11)."""
    if not has_anchors(config):
        return params["decoder.query_position"]
    box = sigmoid(reference_logits)
    center, size = (sine_encoding_of_pairs(pair, config.hidden_dim) for pair in (box[..., :2], box[..., 2:]))
    return center + mlp(np.concatenate([center, size], axis=-1), params, "decoder.box_position", layers=2)


def joined_sight(num_queries: int, sees: BoolArray) -> BoolArray:
    """Who attends to whom among N queries, which all see each other, and D further ones: [B, N + D, N + D]."""
    batch, further, _ = sees.shape
    joined = np.zeros((batch, num_queries + further, num_queries + further), dtype=bool)
    joined[:, :num_queries, :num_queries] = True
    joined[:, num_queries:, num_queries:] = sees
    return joined


def initial_center_logits(state: FloatArray, params: Params, config: ModelConfig) -> FloatArray:
    """ĉ of every query: state O [B, N, C] → [B, N, 2], logits (x, y). Equation (D2); method.md §1.

    Paper, "Dynamic spatial weight maps". With `query_init="grid"` a learned centre of the query's own is added, which
    training starts on a grid, so that the queries begin spread over the image.
    """
    center_logits = mlp(state, params, "decoder.center_head")
    if config.query_init == "grid":
        center_logits = center_logits + params["decoder.query_center"]
    return center_logits


def scale_selection(state: FloatArray, params: Params, name: str, config: ModelConfig) -> FloatArray:
    """How much each query takes from each level. Equation (D6); paper, "SMCA with multi-scale visual features".

    Args:
        state: O, [B, N, C].
        params, name: `name`.level_head, linear, C → J, if the configuration selects scales.
        config: as configured.

    Returns:
        α, [B, N, J], ≥ 0, with a sum of 1 over the levels.
    """
    levels = len(config.strides)
    if not selects_scales(config):
        return np.full((*state.shape[:2], levels), 1.0 / levels)
    return softmax(linear(state, params, f"{name}.level_head"))


def cross_attention(
    query: FloatArray,
    memory: Sequence[FloatArray],
    grids: Sequence[Grid],
    priors: Sequence[tuple[FloatArray, FloatArray]],
    level_weights: FloatArray,
    params: Params,
    name: str,
    config: ModelConfig,
) -> FloatArray:
    """X: project, attend to every level with its prior, mix the levels, project back. Equation (D7); method.md §2, §4.

    Args:
        query: [B, N, C].
        memory: J arrays [B, L_j, C]: the values, and with their position the keys.
        grids: where the cells are.
        priors: center_xy and precision_xy for each level, each [B, h, N, 2].
        level_weights: [B, N, J].
        params, name: `name`.q_proj, k_proj, v_proj and out_proj, the same for all levels.
        config: as configured.

    Returns:
        [B, N, C].
    """
    q = split_heads(linear(query, params, f"{name}.q_proj"), config.num_heads)
    levels = []
    for x, grid, (center_xy, precision_xy) in zip(memory, grids, priors, strict=True):
        k = split_heads(linear(x + grid.position, params, f"{name}.k_proj"), config.num_heads)
        v = split_heads(linear(x, params, f"{name}.v_proj"), config.num_heads)
        levels.append(Level(k, v, center_xy, precision_xy, grid.size, grid.key_padding_mask))
    attended = multi_scale_smca_attention(q, levels, level_weights)
    return linear(merge_heads(attended), params, f"{name}.out_proj")
