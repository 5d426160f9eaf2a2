"""The decoder: where object queries meet the image, and the only place in which SMCA differs from DETR.

t [B, N, C] is the queries' content, 0 at first; p [N, C] their learned position; x [B, L, C] the encoded map with its
position encoding pos; A multi-head self-attention, X cross-attention, ffn the feed-forward network. A layer is

    (1)  post-norm   t = norm1(t + A(t + p, t + p, t))
                     O = prior.norm(t + p)
                     t = norm2(t + X(t + p, x + pos, x));   t = norm3(t + ffn(t))
         pre-norm    y = norm1(t);   t = t + A(y + p, y + p, y)
                     O = prior.norm(t + p)
                     y = norm2(t);   t = t + X(y + p, x + pos, x);   t = t + ffn(norm3(t))

With SMCA, X is modulated by a Gaussian a query and head i, made from the query's state O (method.md §1 and §3):

    (2)  ref    = [ĉ_x, ĉ_y, 0, 0],   ĉ = center_head(O of the first layer) (+ query_center)      logits, for all layers
    (3)  c_i    = σ(ref_xy)·(w, h) + offset_i(O)             in cells; (w, h): the unpadded image in cells, fractional
    (4)  r_i    = scale head(O)                              1 / relative scale; 1 if fixed; one, or one an axis
    (5)  λ_i    = 2·r_i²/β = (r_i·stride/σ_px)²              β = 2·(σ_px/stride)²: σ_px is the prior's width in pixels
    (6)  X_i    = smca_attention(q_i, k_i, v_i, c_i, λ_i)    plain attention, and ref = 0 at first, if "dense"

After every layer, heads decode it, the same ones for all (method.md §5; paper, "SMCA box prediction"):

    (7)  D = norm(t);   logits = class_head(D);   box logits = box_head(D) + ref;   box = σ(box logits)
    (8)  with box refinement, every layer has a box_head of its own, and the next layer's ref = this layer's box logits
         (no gradient passes there in training)

Without refinement, (2) is the published method: one reference centre from the first layer, reused by all. What
changes from layer to layer then is O, and so offsets and scales.
"""

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray
from smca.reference.attention import smca_attention
from smca.reference.config import ModelConfig, uses_prior
from smca.reference.layers import (
    Params,
    dot_product_attention,
    feed_forward,
    layer_norm,
    linear,
    merge_heads,
    mlp,
    multi_head_attention,
    sigmoid,
    split_heads,
)


def decoder(
    memory: FloatArray,
    position: FloatArray,
    valid_cells: FloatArray,
    size: tuple[int, int],
    key_padding_mask: BoolArray,
    params: Params,
    config: ModelConfig,
) -> tuple[FloatArray, FloatArray]:
    """All layers and their decoded outputs. Equations (1), (2), (7), (8).

    Args:
        memory: [B, L, C], the encoder's output.
        position: [B, L, C], the cells' sine encoding.
        valid_cells: [B, 2], (height, width) of the unpadded image in cells, fractional.
        size: (H, W), H·W = L.
        key_padding_mask: [B, L], True = padded.
        params: with the names of `model.parameter_shapes`.
        config: as configured.

    Returns:
        logits [M, B, N, K], boxes [M, B, N, 4] (cxcywh in [0, 1] of the unpadded image).
    """
    query_position = params["decoder.query_position"]  # p [N, C]
    batch = memory.shape[0]
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

        center_xy = precision_xy = None
        if uses_prior(config):
            state = layer_norm(t + query_position, params, f"{name}.prior.norm")  # O
            if index == 0:
                reference_logits[..., :2] = initial_center_logits(state, params, config)
            center_xy, precision_xy = spatial_prior(state, reference_logits, valid_cells, params, name, config)

        y = layer_norm(t, params, f"{name}.norm2") if config.pre_norm else t
        t = t + cross_attention(
            y + query_position, memory + position, memory, center_xy, precision_xy, size, key_padding_mask,
            params, f"{name}.cross_attn", config,
        )  # fmt: skip
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
            reference_logits = box_logits  # (8)

    return np.stack(layer_logits), np.stack(layer_boxes)


def initial_center_logits(state: FloatArray, params: Params, config: ModelConfig) -> FloatArray:
    """ĉ of every query: state O [B, N, C] → [B, N, 2], logits (x, y). Equation (2); method.md §1.

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
    valid_cells: FloatArray,
    params: Params,
    name: str,
    config: ModelConfig,
) -> tuple[FloatArray, FloatArray]:
    """Centre and precision of every query's Gaussian, in every head. Equations (3), (4), (5); method.md §1 and §3.

    Args:
        state: O, [B, N, C].
        reference_logits: [B, N, 4]; only x and y matter here.
        valid_cells: [B, 2], (height, width) of the unpadded image in cells.
        params, name: `name`.prior.offset_head [2h, C] and, unless fixed, `name`.prior.scale_head [h or 2h, C]. Of 2h
            outputs, 2i and 2i + 1 are x and y of head i.
        config: as configured.

    Returns:
        center_xy [B, h, N, 2] in cells, precision_xy [B, h, N, 2] in cells⁻².
    """
    batch, queries, _ = state.shape
    per_head = (batch, queries, config.num_heads, 2)
    valid_wh = valid_cells[:, None, ::-1]  # [B, 1, 2]
    center_xy = sigmoid(reference_logits[..., :2]) * valid_wh  # [B, N, 2]
    offset_xy = linear(state, params, f"{name}.prior.offset_head").reshape(per_head)
    center_per_head_xy = center_xy[:, :, None, :] + offset_xy  # (3) [B, N, h, 2]

    if config.prior_scale == "fixed":
        inverse_scale_xy = np.ones(per_head)  # (4)
    elif config.prior_scale == "single":
        inverse_scale = linear(state, params, f"{name}.prior.scale_head")  # [B, N, h]
        inverse_scale_xy = np.broadcast_to(inverse_scale[..., None], per_head)
    else:
        inverse_scale_xy = linear(state, params, f"{name}.prior.scale_head").reshape(per_head)
    precision_xy = (inverse_scale_xy * config.stride / config.prior_sigma_px) ** 2  # (5)
    return center_per_head_xy.transpose(0, 2, 1, 3), precision_xy.transpose(0, 2, 1, 3)


def cross_attention(
    query: FloatArray,
    key: FloatArray,
    value: FloatArray,
    center_xy: FloatArray | None,
    precision_xy: FloatArray | None,
    size: tuple[int, int],
    key_padding_mask: BoolArray,
    params: Params,
    name: str,
    config: ModelConfig,
) -> FloatArray:
    """X: project, attend with the prior, or without where it is None, project back. Equation (6); method.md §2.

    Args:
        query: [B, N, C].
        key, value: [B, L, C].
        center_xy, precision_xy: [B, h, N, 2], or both None.
        size: (H, W), H·W = L.
        key_padding_mask: [B, L], True = padded.
        params, name: `name`.q_proj, k_proj, v_proj and out_proj.
        config: as configured.

    Returns:
        [B, N, C].
    """
    q = split_heads(linear(query, params, f"{name}.q_proj"), config.num_heads)
    k = split_heads(linear(key, params, f"{name}.k_proj"), config.num_heads)
    v = split_heads(linear(value, params, f"{name}.v_proj"), config.num_heads)
    if center_xy is None or precision_xy is None:
        attended = dot_product_attention(q, k, v, key_padding_mask)
    else:
        attended = smca_attention(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    return linear(merge_heads(attended), params, f"{name}.out_proj")
