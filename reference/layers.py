"""The parts that everybody knows, so that nothing about them is left to guess.

    (1)  σ(x) = 1 / (1 + e^−x)            softplus(x) = ln(1 + e^x) = −ln σ(−x)
    (2)  linear(x) = x·Wᵀ + b             W is [out, in], as PyTorch stores it
    (3)  layer_norm(x) = (x − mean) / √(variance + 10⁻⁵) · weight + bias      over the last axis, biased variance
    (4)  attention(q, k, v) = softmax(q·kᵀ/√d)·v                              −∞ at padded keys
    (5)  encoder layer, with A = multi-head attention and ffn(x) = linear2(relu(linear1(x))):
           post-norm   x = norm1(x + A(x + pos, x + pos, x));              x = norm2(x + ffn(x))
           pre-norm    y = norm1(x);  x = x + A(y + pos, y + pos, y);      x = x + ffn(norm2(x))

The position encoding is added to queries and keys, never to values, and again in every layer (DETR, "Transformer").
Dropout is absent: this is the model in evaluation mode. Padded cells do attend (their rows are computed and ignored),
but nothing attends to them, so whatever stands there, NaN included, stays there.
"""

from collections.abc import Mapping

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray

LAYER_NORM_EPSILON = 1e-5

Params = Mapping[str, FloatArray]


def sigmoid(x: FloatArray) -> FloatArray:
    """σ(x), elementwise, exact at both ends. Equation (1).

    Both branches use e^−|x|, which cannot overflow and keeps small results small instead of 0.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    decayed = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, decayed) / (1.0 + decayed)


def softplus(x: FloatArray) -> FloatArray:
    """ln(1 + e^x), elementwise, without overflow: −ln σ(−x). Equation (1).

    >>> softplus(np.array([-1000.0, 0.0, 1000.0])).round(4).tolist()
    [0.0, 0.6931, 1000.0]
    """
    result: FloatArray = np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))
    return result


def relu(x: FloatArray) -> FloatArray:
    """max(x, 0), elementwise.

    >>> relu(np.array([-2.0, 3.0])).tolist()
    [0.0, 3.0]
    """
    result: FloatArray = np.maximum(x, 0.0)
    return result


def linear(x: FloatArray, params: Params, name: str) -> FloatArray:
    """x·Wᵀ + b with W = `name`.weight [out, in] and b = `name`.bias [out]. Equation (2). [..., in] → [..., out].

    >>> linear(np.array([1.0, 2.0]), {"f.weight": np.array([[3.0, 4.0]]), "f.bias": np.array([0.5])}, "f").tolist()
    [11.5]
    """
    result: FloatArray = x @ params[f"{name}.weight"].T + params[f"{name}.bias"]
    return result


def mlp(x: FloatArray, params: Params, name: str, layers: int = 3) -> FloatArray:
    """`layers` linear maps, `name`.layers.0 and on, with a ReLU between them. [..., in] → [..., out]."""
    for index in range(layers):
        x = linear(relu(x) if index > 0 else x, params, f"{name}.layers.{index}")
    return x


def feed_forward(x: FloatArray, params: Params, name: str) -> FloatArray:
    """ffn(x) = linear2(relu(linear1(x))), [..., C] → [..., F] → [..., C]. Equation (5)."""
    return linear(relu(linear(x, params, f"{name}.linear1")), params, f"{name}.linear2")


def layer_norm(x: FloatArray, params: Params, name: str) -> FloatArray:
    """Equation (3). [..., C] → [..., C].

    Two channels at distance 2 from each other become ±1 (a hair less, because of the 10⁻⁵):

    >>> layer_norm(np.array([3.0, 5.0]), {"n.weight": np.ones(2), "n.bias": np.zeros(2)}, "n").round(4).tolist()
    [-1.0, 1.0]
    """
    centered = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centered**2, axis=-1, keepdims=True)
    normalised: FloatArray = centered / np.sqrt(variance + LAYER_NORM_EPSILON)
    return normalised * params[f"{name}.weight"] + params[f"{name}.bias"]


def split_heads(x: FloatArray, num_heads: int) -> FloatArray:
    """[B, L, h·d] → [B, h, L, d]: head i has the channels i·d to (i + 1)·d."""
    batch, length, channels = x.shape
    return x.reshape(batch, length, num_heads, channels // num_heads).transpose(0, 2, 1, 3)


def merge_heads(x: FloatArray) -> FloatArray:
    """[B, h, L, d] → [B, L, h·d], the inverse of `split_heads`."""
    batch, heads, length, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * head_dim)


def dot_product_attention(
    q: FloatArray, k: FloatArray, v: FloatArray, key_padding_mask: BoolArray | None = None
) -> FloatArray:
    """Plain attention. Equation (4); DETR's, and SMCA's at a precision of 0.

    Args:
        q: [B, h, N, d].
        k, v: [B, h, L, d]; never read where padded.
        key_padding_mask: [B, L], True = padded.

    Returns:
        [B, h, N, d].
    """
    logits: FloatArray = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5  # [B, h, N, L]
    if key_padding_mask is not None:
        logits = np.where(key_padding_mask[:, None, None, :], -np.inf, logits)
        v = np.where(key_padding_mask[:, None, :, None], 0.0, v)  # a weight of 0 alone would not stop a NaN
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights: FloatArray = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return weights @ v


def multi_head_attention(
    query: FloatArray,
    key: FloatArray,
    value: FloatArray,
    params: Params,
    name: str,
    num_heads: int,
    key_padding_mask: BoolArray | None = None,
) -> FloatArray:
    """Project, attend in every head, project back: A of equation (5).

    Args:
        query: [B, N, C].
        key, value: [B, L, C].
        params, name: `name`.q_proj, k_proj, v_proj and out_proj, each a linear map C → C.
        num_heads: h, which divides C.
        key_padding_mask: [B, L], True = padded.

    Returns:
        [B, N, C].
    """
    q = split_heads(linear(query, params, f"{name}.q_proj"), num_heads)
    k = split_heads(linear(key, params, f"{name}.k_proj"), num_heads)
    v = split_heads(linear(value, params, f"{name}.v_proj"), num_heads)
    return linear(merge_heads(dot_product_attention(q, k, v, key_padding_mask)), params, f"{name}.out_proj")


def encoder_layer(
    x: FloatArray,
    position: FloatArray,
    key_padding_mask: BoolArray,
    params: Params,
    name: str,
    num_heads: int,
    pre_norm: bool,
) -> FloatArray:
    """One layer of the encoder. Equation (5); method.md, opening ("everything else of DETR stays").

    Args:
        x: [B, L, C], the cells of the map, row-major.
        position: [B, L, C], the sine encoding of the cells.
        key_padding_mask: [B, L], True = padded.
        params, name: `name`.self_attn, norm1, norm2, linear1, linear2.
        num_heads, pre_norm: as configured.

    Returns:
        [B, L, C].
    """
    y = layer_norm(x, params, f"{name}.norm1") if pre_norm else x
    x = x + multi_head_attention(
        y + position, y + position, y, params, f"{name}.self_attn", num_heads, key_padding_mask
    )
    if pre_norm:
        return x + feed_forward(layer_norm(x, params, f"{name}.norm2"), params, name)
    x = layer_norm(x, params, f"{name}.norm1")
    return layer_norm(x + feed_forward(x, params, name), params, f"{name}.norm2")
