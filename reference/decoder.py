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

With SMCA, X is modulated by one Gaussian per query, head i and level j, made from the query's state O (method.md §1, §3):

    (D2) ref    = [ĉ_x, ĉ_y, 0, 0],   ĉ = center_head(O of the first layer) (+ query_center)      logits, for all layers
    (D3) c_ij   = σ(ref_xy)·(w_j, h_j) + offset_ij(O)        in cells; (w_j, h_j): the unpadded image in cells of level j
    (D4) r_ij   = scale head(O)                              1 / relative scale; 1 if fixed; one, or one per axis
    (D5) λ_ij   = 2·r_ij²/β_j = (r_ij·stride_j/σ_px)²        β_j = 2·(σ_px/stride_j)²: σ_px is the prior's width in pixels
    (D6) α      = softmax over levels of level_head(O)       one for all heads (method.md §4); 1/J without scale selection
    (D7) X_i    = Σ_j α_j·smca_attention(q_i, k_ij, v_ij, c_ij, λ_ij)        λ = 0, and ref = 0 at first, if "dense"

One level is the case J = 1: α = 1, and there is no level head. A plain DETR has no head that reads O, so no state_norm.
After every layer, heads decode it, the same ones for all (method.md §5; paper, "SMCA box prediction"):

    (D8) D = norm(t);   logits = class_head(D);   box logits = box_head(D) + ref;   box = σ(box logits)
    (D9) with box refinement, every layer has a box_head of its own, and the next layer's ref = this layer's box logits
         (no gradient passes there in training)

Without refinement, (D2) is the published method: one reference centre from the first layer, reused by all. What
changes from layer to layer then is O, and so offsets, scales and level weights.
"""

from collections.abc import Sequence

import numpy as np

from smca.reference.arrays import FloatArray
from smca.reference.attention import Level, multi_scale_smca_attention
from smca.reference.config import ModelConfig, selects_scales, uses_prior
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
from smca.reference.position import Grid


def decoder(
    memory: Sequence[FloatArray], grids: Sequence[Grid], params: Params, config: ModelConfig
) -> tuple[FloatArray, FloatArray]:
    """All layers and their decoded outputs. Equations (D1), (D2), (D8), (D9).

    Args:
        memory: the encoder's output, J arrays [B, L_j, C].
        grids: where their cells are.
        params: with the names of `parameters.parameter_shapes`.
        config: as configured.

    Returns:
        logits [M, B, N, K], boxes [M, B, N, 4] (cxcywh in [0, 1] of the unpadded image).
    """
    query_position = params["decoder.query_position"]  # p [N, C]
    batch = memory[0].shape[0]
    t = np.zeros((batch, *query_position.shape))
    reference_logits = np.zeros((batch, query_position.shape[0], 4))  # ref [B, N, 4]
    layer_logits, layer_boxes = [], []

    for index in range(config.decoder_layers):
        name = f"decoder.layers.{index}"

        y = layer_norm(t, params, f"{name}.norm1") if config.pre_norm else t
        q = k = y + query_position
        t = t + multi_head_attention(q, k, y, params, f"{name}.self_attn", config.num_heads)
        if not config.pre_norm:
            t = layer_norm(t, params, f"{name}.norm1")

        state = t + query_position
        if uses_prior(config) or selects_scales(config):
            state = layer_norm(state, params, f"{name}.state_norm")  # O
        if uses_prior(config) and index == 0:
            reference_logits[..., :2] = initial_center_logits(state, params, config)
        priors = spatial_prior(state, reference_logits, grids, params, name, config)
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
        layer_logits.append(linear(decoded, params, "decoder.class_head"))
        layer_boxes.append(sigmoid(box_logits))
        if config.box_refinement:
            reference_logits = box_logits  # (D9)

    return np.stack(layer_logits), np.stack(layer_boxes)


def initial_center_logits(state: FloatArray, params: Params, config: ModelConfig) -> FloatArray:
    """ĉ of every query: state O [B, N, C] → [B, N, 2], logits (x, y). Equation (D2); method.md §1.

    Paper, "Dynamic spatial weight maps". With `query_init="grid"` a learned centre of the query's own is added, which
    training starts on a grid, so that the queries begin spread over the image.
    """
    center_logits = mlp(state, params, "decoder.center_head")
    if config.query_init == "grid":
        center_logits = center_logits + params["decoder.query_center"]
    return center_logits


def spatial_prior(
    state: FloatArray,
    reference_logits: FloatArray,
    grids: Sequence[Grid],
    params: Params,
    name: str,
    config: ModelConfig,
) -> list[tuple[FloatArray, FloatArray]]:
    """Centre and precision of every query's Gaussians. Equations (D3), (D4), (D5); method.md §1, §3 and §4.

    Args:
        state: O, [B, N, C].
        reference_logits: [B, N, 4]; only x and y matter here.
        grids: the J levels.
        params, name: `name`.prior.offset_head and, unless fixed, `name`.prior.scale_head. Their outputs are, in this
            order, [g, J, 2] and [g, J, 1 or 2]: head first, then level, then x and y; g = h, or 1 if heads share.
        config: as configured.

    Returns:
        For each level center_xy [B, h, N, 2] in cells and precision_xy [B, h, N, 2] in cells⁻². Precisions of 0, and no
        parameter is read, if there is no prior.
    """
    batch, queries, _ = state.shape
    if not uses_prior(config):
        none = np.zeros((batch, config.num_heads, queries, 2))
        return [(none, none)] * len(grids)

    groups = 1 if config.prior_heads == "shared" else config.num_heads
    each = (batch, queries, groups, len(grids))
    offset_xy = linear(state, params, f"{name}.prior.offset_head").reshape(*each, 2)
    if config.prior_scale == "fixed":
        inverse_scale = np.ones((*each, 1))  # (D4)
    else:
        inverse_scale = linear(state, params, f"{name}.prior.scale_head").reshape(*each, -1)

    priors = []
    for j, grid in enumerate(grids):
        center_xy = sigmoid(reference_logits[..., :2]) * grid.valid_cells[:, None, ::-1]  # [B, N, 2]
        center_xy = center_xy[:, :, None, :] + offset_xy[:, :, :, j]  # (D3) [B, N, g, 2]
        precision_xy = (inverse_scale[:, :, :, j] * grid.stride / config.prior_sigma_px) ** 2  # (D5) [B, N, g, 1 or 2]
        priors.append((_for_heads(center_xy, config.num_heads), _for_heads(precision_xy, config.num_heads)))
    return priors


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


def _for_heads(values: FloatArray, num_heads: int) -> FloatArray:
    """[B, N, h or 1, 2 or 1] → [B, h, N, 2]: one value serves all heads, or both axes."""
    batch, queries = values.shape[:2]
    return np.broadcast_to(values, (batch, queries, num_heads, 2)).transpose(0, 2, 1, 3)
