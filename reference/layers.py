"""The parts that everybody knows, so that nothing about them is left to guess.

    (L1) σ(x) = 1 / (1 + e^−x)            softplus(x) = ln(1 + e^x) = −ln σ(−x)
    (L2) linear(x) = x·Wᵀ + b             W is [out, in], as PyTorch stores it
    (L3) layer_norm(x) = (x − mean) / √(variance + 10⁻⁵) · weight + bias      over the last axis, biased variance
    (L4) attention(q, k, v) = softmax(q·kᵀ/√d)·v                              −∞ at padded keys
    (L5) ffn(x) = linear2(relu(linear1(x)))
    (L6) conv(x)_o(i, j) = b_o + Σ_c Σ_st W_oc(s, t)·x_c(S·i + s, S·j + t)    stride S; 0 outside the map
         depthwise(x)_c(i, j) = Σ_st W_c(s, t)·x_c(S·i + s, S·j + t)          each channel by itself, no bias
         k × k taps, k odd: s and t from −(k − 1)/2 to (k − 1)/2, s along rows

Dropout is absent: this is the model in evaluation mode. Padded cells do attend (their rows are computed and ignored),
but nothing attends to them, so whatever stands there, NaN included, stays there. A convolution does read what lies
beside a cell: who calls it puts 0 into padded cells first (`zero_padded`), so that an image's edge is the same whether
the map ends there or padding begins.
"""

from collections.abc import Mapping

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray

LAYER_NORM_EPSILON = 1e-5

Params = Mapping[str, FloatArray]


def sigmoid(x: FloatArray) -> FloatArray:
    """σ(x), elementwise, exact at both ends. Equation (L1).

    Both branches use e^−|x|, which cannot overflow and keeps small results small instead of 0.

    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    decayed = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, decayed) / (1.0 + decayed)


def softplus(x: FloatArray) -> FloatArray:
    """ln(1 + e^x), elementwise, without overflow: −ln σ(−x). Equation (L1).

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


def softmax(x: FloatArray) -> FloatArray:
    """e^x over its sum along the last axis. Equation (L4).

    It doesn't see a constant, so the largest x is taken off, and no exponential overflows; −∞ becomes 0.

    >>> softmax(np.array([-np.inf, 1000.0, 1000.0])).tolist()
    [0.0, 0.5, 0.5]
    """
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    weights: FloatArray = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return weights


def linear(x: FloatArray, params: Params, name: str) -> FloatArray:
    """x·Wᵀ + b with W = `name`.weight [out, in] and b = `name`.bias [out]. Equation (L2). [..., in] → [..., out].

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
    """ffn(x) = linear2(relu(linear1(x))), [..., C] → [..., F] → [..., C]. Equation (L5)."""
    return linear(relu(linear(x, params, f"{name}.linear1")), params, f"{name}.linear2")


def layer_norm(x: FloatArray, params: Params, name: str) -> FloatArray:
    """Equation (L3). [..., C] → [..., C].

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
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    key_padding_mask: BoolArray | None = None,
    sees: BoolArray | None = None,
) -> FloatArray:
    """Plain attention. Equation (L4); DETR's.

    Args:
        q: [B, h, N, d].
        k, v: [B, h, L, d]; never read where padded.
        key_padding_mask: [B, L], True = padded.
        sees: [B, N, L], False where a query is not to attend to a key, which then has a logit of −∞ as well.

    Returns:
        [B, h, N, d].
    """
    logits: FloatArray = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5  # [B, h, N, L]
    if sees is not None:
        logits = np.where(sees[:, None], logits, -np.inf)
    if key_padding_mask is not None:
        logits = np.where(key_padding_mask[:, None, None, :], -np.inf, logits)
        v = np.where(key_padding_mask[:, None, :, None], 0.0, v)  # a weight of 0 alone would not stop a NaN
    return softmax(logits) @ v


def multi_head_attention(
    query: FloatArray,
    key: FloatArray,
    value: FloatArray,
    params: Params,
    name: str,
    num_heads: int,
    key_padding_mask: BoolArray | None = None,
    sees: BoolArray | None = None,
) -> FloatArray:
    """Project, attend in every head, project back.

    Args:
        query: [B, N, C].
        key, value: [B, L, C].
        params, name: `name`.q_proj, k_proj, v_proj and out_proj, each a linear map C → C.
        num_heads: h, which divides C.
        key_padding_mask: [B, L], True = padded.
        sees: [B, N, L], False where a query is not to attend to a key.

    Returns:
        [B, N, C].
    """
    q = split_heads(linear(query, params, f"{name}.q_proj"), num_heads)
    k = split_heads(linear(key, params, f"{name}.k_proj"), num_heads)
    v = split_heads(linear(value, params, f"{name}.v_proj"), num_heads)
    return linear(merge_heads(dot_product_attention(q, k, v, key_padding_mask, sees)), params, f"{name}.out_proj")


def convolution(x: FloatArray, params: Params, name: str, stride: int = 1) -> FloatArray:
    """A k × k convolution with zeros outside the map. Equation (L6). `name`.weight [out, in, k, k], `name`.bias [out].

    [B, in, H, W] → [B, out, ⌈H/stride⌉, ⌈W/stride⌉]; output cell (i, j) has its middle tap on input cell
    (stride·i, stride·j).
    """
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    read = _read_by_taps(x, weight.shape[-1], stride)
    mixed: FloatArray = np.einsum("ocst,stbchw->bohw", weight, read, optimize=True)
    return mixed + bias[:, None, None]


def depthwise_convolution(x: FloatArray, params: Params, name: str, stride: int = 1) -> FloatArray:
    """As `convolution`, but each channel by itself and without bias. Equation (L6). `name`.weight [C, 1, k, k].

    Kernels of three ones in a row add up neighbours; with a stride of 2, those around cells 0 and 2:

    >>> ones_in_a_row = {"f.weight": np.array([0, 0, 0, 1, 1, 1, 0, 0, 0.0]).reshape(1, 1, 3, 3)}
    >>> row = np.array([1.0, 2.0, 4.0]).reshape(1, 1, 1, 3)
    >>> depthwise_convolution(row, ones_in_a_row, "f").ravel().tolist()
    [3.0, 7.0, 6.0]
    >>> depthwise_convolution(row, ones_in_a_row, "f", stride=2).ravel().tolist()
    [3.0, 6.0]
    """
    weight = params[f"{name}.weight"]
    read = _read_by_taps(x, weight.shape[-1], stride)
    mixed: FloatArray = np.einsum("cst,stbchw->bchw", weight[:, 0], read)
    return mixed


def zero_padded(x: FloatArray, padding: BoolArray) -> FloatArray:
    """0 in place of padded cells: a map [B, C, H, W] and its mask [B, H·W] → [B, C, H, W]."""
    batch, _, height, width = x.shape
    zeroed: FloatArray = np.where(padding.reshape(batch, 1, height, width), 0.0, x)
    return zeroed


def cells_of_map(x: FloatArray) -> FloatArray:
    """[B, C, H, W] → [B, H·W, C], row-major."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height * width).transpose(0, 2, 1)


def map_of_cells(x: FloatArray, size: tuple[int, int]) -> FloatArray:
    """[B, H·W, C] → [B, C, H, W], the inverse of `cells_of_map`."""
    batch, _, channels = x.shape
    return x.transpose(0, 2, 1).reshape(batch, channels, *size)


def _read_by_taps(x: FloatArray, kernel: int, stride: int) -> FloatArray:
    """What each tap of a kernel reads for each output cell: [B, C, H, W] → [k, k, B, C, ⌈H/stride⌉, ⌈W/stride⌉]."""
    height, width = x.shape[2:]
    margin = kernel // 2
    framed = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    return np.stack(
        [
            np.stack([framed[..., s : s + height : stride, t : t + width : stride] for t in range(kernel)])
            for s in range(kernel)
        ]
    )
