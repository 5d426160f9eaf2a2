"""Spatially modulated co-attention, forward: over one feature level and over several.

The logarithm of a query's Gaussian, equations (1) to (3) of `gaussian`, is added to its attention logits (method.md §2
and §3). With keys at l:

    (4)  S_nl = q_n·k_l / √d + log G_n(l)                                     −∞ where key l is padded
    (5)  A_nl = exp(S_nl) / Σ_l' exp(S_nl')                                   softmax over the keys
    (6)  O_n = Σ_l A_nl·v_l

Several levels (method.md §4) are that for each level j by itself, mixed by weights α that the query gives the levels:

    (13) O_n = Σ_j α_nj·O_nj               O_nj from (4) to (6): each softmax is over its own level

Two things to notice. λ = 0 makes (4) DETR's plain attention, exactly. G enters its own head only, so "one head" is h = 1
and "multi-head modulation" is every h.

Everything here speaks NumPy's dispatch protocols and never converts its inputs: given CuPy arrays, the same code runs
on a GPU. Cell coordinates are float64, so float32 inputs are promoted when they meet them. Paper: "Dynamic spatial
weight maps", "Spatially-modulated co-attention", "SMCA with multi-head modulation", "SMCA with multi-scale visual
features".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray, require_padding_mask, require_shape
from smca.reference.gaussian import key_minus_center


class Level(NamedTuple):
    """One feature level: what `smca_attention` takes after q, in that order."""

    k: FloatArray
    """[B, h, H·W, d]"""
    v: FloatArray
    """[B, h, H·W, d]"""
    center_xy: FloatArray
    """[B, h, N, 2], (x, y) in cells of this level."""
    precision_xy: FloatArray
    """[B, h, N, 2], in this level's cells⁻²."""
    size: tuple[int, int]
    """(H, W) of this level."""
    key_padding_mask: BoolArray | None = None
    """[B, H·W], True = padded. In every image, some key of every level must not be."""


def smca_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    center_xy: FloatArray,
    precision_xy: FloatArray,
    size: tuple[int, int],
    key_padding_mask: BoolArray | None = None,
) -> FloatArray:
    """Attention modulated by a Gaussian per query and head. Equations (3) to (6); method.md §2 and §3.

    Args:
        q: [B, h, N, d].
        k, v: [B, h, H·W, d], row-major over the map. Values at padded keys are never read: they may be NaN or inf.
        center_xy: [B, h, N, 2], (x, y) of the Gaussian's centre in cells.
        precision_xy: [B, h, N, 2], λ per axis in cells⁻²; 0 leaves that axis unmodulated.
        size: (H, W).
        key_padding_mask: [B, H·W], True where a key is padded; None where none is.

    Returns:
        [B, h, N, d].

    Raises:
        ValueError: shapes that don't fit each other or `size`, or an image whose keys are all padded.

    One query at the middle of a 1 × 3 map, q = 0, so that the prior alone decides. With λ = 2·ln 2 a key at distance
    one has weight exp(−½·λ) = ½, so the softmax is (¼, ½, ¼):

    >>> q = np.zeros((1, 1, 1, 1))
    >>> k = np.ones((1, 1, 3, 1))
    >>> v = np.array([4.0, 8.0, 0.0]).reshape(1, 1, 3, 1)
    >>> center, precision = np.array([1.5, 0.5]).reshape(1, 1, 1, 2), np.full((1, 1, 1, 2), 2 * np.log(2))
    >>> round(float(smca_attention(q, k, v, center, precision, (1, 3)).item()), 12)
    5.0

    Without a prior (λ = 0) it is the plain mean of 4, 8 and 0; with the last key padded, that of 4 and 8:

    >>> float(smca_attention(q, k, v, center, 0 * precision, (1, 3)).item())
    4.0
    >>> float(smca_attention(q, k, v, center, 0 * precision, (1, 3), np.array([[False, False, True]])).item())
    6.0
    """
    check_attention_shapes(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    k, v = zero_padded_keys(k, key_padding_mask), zero_padded_keys(v, key_padding_mask)
    weights = attention_weights(q, k, center_xy, precision_xy, size, key_padding_mask)
    return weights @ v  # (6)


def multi_scale_smca_attention(q: FloatArray, levels: Sequence[Level], level_weights: FloatArray) -> FloatArray:
    """Attention over several feature levels, mixed by each query's weights. Equation (13); method.md §4.

    Args:
        q: [B, h, N, d], the same for all levels.
        levels: J of them, each with a size, keys and Gaussians of its own.
        level_weights: [B, N, J], α, shared by the heads. The model gives numbers ≥ 0 that sum to 1; any will do.

    Returns:
        [B, h, N, d].

    Raises:
        ValueError: no level, shapes that don't fit each other, or an image with a level whose keys are all padded.
            (A cell that holds any pixel of the image is not padding, so the model never has one.)

    The example of `smca_attention`, whose answer is 5, beside a level of one cell with the value 9. With weights ¾ and
    ¼ the answer is ¾·5 + ¼·9:

    >>> q, k, v = np.zeros((1, 1, 1, 1)), np.ones((1, 1, 3, 1)), np.array([4.0, 8.0, 0.0]).reshape(1, 1, 3, 1)
    >>> center, precision = np.array([1.5, 0.5]).reshape(1, 1, 1, 2), np.full((1, 1, 1, 2), 2 * np.log(2))
    >>> levels = [Level(k, v, center, precision, (1, 3)), Level(q, q + 9.0, center / 3, precision, (1, 1))]
    >>> round(multi_scale_smca_attention(q, levels, np.array([[[0.75, 0.25]]])).item(), 12)
    6.0
    """
    check_levels(q, levels, level_weights)
    weighted = [of_level(level_weights, j) * smca_attention(q, *level) for j, level in enumerate(levels)]
    mixed: FloatArray = np.sum(np.stack(weighted), axis=0)  # (13)
    return mixed


def attention_weights(
    q: FloatArray,
    k: FloatArray,
    center_xy: FloatArray,
    precision_xy: FloatArray,
    size: tuple[int, int],
    key_padding_mask: BoolArray | None,
) -> FloatArray:
    """A [B, h, N, L]: equations (4) and (5), with (3) of `gaussian`. `k` is 0 at padded keys."""
    squared_xy = key_minus_center(center_xy, size) ** 2  # [B, h, N, L, 2]
    log_prior = -0.5 * np.einsum("bhna,bhnla->bhnl", precision_xy, squared_xy)  # (3)
    logits = q @ np.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5 + log_prior  # (4)
    if key_padding_mask is not None:
        logits = np.where(key_padding_mask[:, None, None, :], -np.inf, logits)
    # Softmax doesn't see a constant; taking the largest logit off keeps every exponential at most 1.
    exponentials = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    weights: FloatArray = exponentials / np.sum(exponentials, axis=-1, keepdims=True)  # (5)
    return weights


def zero_padded_keys(keys: FloatArray, key_padding_mask: BoolArray | None) -> FloatArray:
    """Put 0 where a key is padded. A weight of 0 alone would not do: 0·NaN is NaN."""
    if key_padding_mask is None:
        return keys
    zeroed: FloatArray = np.where(key_padding_mask[:, None, :, None], 0.0, keys)
    return zeroed


def check_attention_shapes(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    center_xy: FloatArray,
    precision_xy: FloatArray,
    size: tuple[int, int],
    key_padding_mask: BoolArray | None,
) -> None:
    """Raise a ValueError unless these fit each other, as `smca_attention` takes them."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size: expected (H, W) with both ≥ 1, got {size}. An attention needs a key.")
    require_shape("q", q, (None, None, None, None), "Give it as [B, h, N, d].")
    b, h, n, d = q.shape
    keys = height * width
    remedy = f"size is (H, W) = {(height, width)}, so there are {keys} keys, and q is [B, h, N, d] = {(b, h, n, d)}."
    require_shape("k", k, (b, h, keys, d), remedy)
    require_shape("v", v, (b, h, keys, d), remedy)
    require_shape("center_xy", center_xy, (b, h, n, 2), remedy)
    require_shape("precision_xy", precision_xy, (b, h, n, 2), remedy)
    if key_padding_mask is not None:
        require_padding_mask(key_padding_mask, (b, keys), remedy)


def of_level(level_weights: FloatArray, j: int) -> FloatArray:
    """α of level j for every head and channel: [B, N, J] → [B, 1, N, 1]."""
    return level_weights[:, None, :, j, None]


def check_levels(q: FloatArray, levels: Sequence[Level], level_weights: FloatArray) -> None:
    """Raise a ValueError unless these fit each other, as `multi_scale_smca_attention` takes them."""
    if len(levels) == 0:
        raise ValueError("levels: expected at least one feature level, got none.")
    for j, level in enumerate(levels):
        try:
            check_attention_shapes(q, *level)
        except ValueError as error:
            raise ValueError(f"levels[{j}]: {error}") from error
    expected = (q.shape[0], q.shape[2], len(levels))
    require_shape(
        "level_weights", level_weights, expected, "Give [B, N, J]: one weight per query and level, for all heads."
    )
