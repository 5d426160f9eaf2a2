"""Spatially modulated co-attention, backward: the gradient of (4) to (6) and (13), written out.

For a gradient Ō of the loss with respect to the output O of `attention_forward`, by the chain rule from (6) back to (3):

    (7)  v̄_l  = Σ_n A_nl·Ō_n                                                  from (6)
    (8)  Ā_nl = Ō_n·v_l                                                       from (6)
    (9)  S̄_nl = A_nl·( Ā_nl − Σ_l' A_nl'·Ā_nl' )                              from (5)
    (10) q̄_n  = Σ_l S̄_nl·k_l / √d          k̄_l = Σ_n S̄_nl·q_n / √d            from (4)
    (11) c̄_n  = Σ_l S̄_nl·λ_n·(p_l − c_n)                                      from (3), per axis, p_l = (x, y) of key l
    (12) λ̄_n  = Σ_l S̄_nl·( −½·(p_l − c_n)² )                                  from (3), per axis

and over several levels:

    (14) Ō_nj = α_nj·Ō_n                   with which (7) to (12) hold in every level; q̄_n sums over them
    (15) ᾱ_nj = Σ_heads Ō_n·O_nj           α is shared by the heads

What softmax drops in (5) is dropped in (9): S̄ sums to 0 over the keys, so a term that is the same for all keys gets no
gradient. The fused kernels of the production model compute these equations, block by block.
"""

from collections.abc import Sequence

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray, require_shape
from smca.reference.attention_forward import (
    Level,
    attention_weights,
    check_attention_shapes,
    check_levels,
    of_level,
    smca_attention,
    zero_padded_keys,
)
from smca.reference.gaussian import key_minus_center


def smca_attention_vjp(
    grad_out: FloatArray,
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    center_xy: FloatArray,
    precision_xy: FloatArray,
    size: tuple[int, int],
    key_padding_mask: BoolArray | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """The backward pass of `smca_attention`, written out. Equations (7) to (12).

    Args:
        grad_out: [B, h, N, d], the gradient of a scalar with respect to the output.
        q, k, v, center_xy, precision_xy, size, key_padding_mask: as given to `smca_attention`.

    Returns:
        dq [B, h, N, d], dk [B, h, H·W, d], dv [B, h, H·W, d], dcenter_xy [B, h, N, 2] (per cell),
        dprecision_xy [B, h, N, 2] (per cell⁻²). dk and dv are 0 at padded keys.

    Raises:
        ValueError: as `smca_attention`, or a `grad_out` that hasn't the shape of `q`.

    The example of `smca_attention`: weights (¼, ½, ¼), values (4, 8, 0), output 5. By (9) S̄ = (¼·(4−5), ½·(8−5),
    ¼·(0−5)) = (−¼, 1½, −1¼). The centre is pulled towards the keys with a positive S̄, here to the left, λ·(¼ − 1¼):

    >>> q, k = np.zeros((1, 1, 1, 1)), np.ones((1, 1, 3, 1))
    >>> v = np.array([4.0, 8.0, 0.0]).reshape(1, 1, 3, 1)
    >>> center, precision = np.array([1.5, 0.5]).reshape(1, 1, 1, 2), np.full((1, 1, 1, 2), 2 * np.log(2))
    >>> dq, dk, dv, dc, dp = smca_attention_vjp(np.ones((1, 1, 1, 1)), q, k, v, center, precision, (1, 3))
    >>> dv.ravel().round(12).tolist()
    [0.25, 0.5, 0.25]
    >>> (dc / precision).ravel().round(12).tolist()
    [-1.0, 0.0]
    >>> dp.ravel().round(12).tolist()
    [0.75, 0.0]
    """
    check_attention_shapes(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    require_shape("grad_out", grad_out, tuple(q.shape), "It is the gradient of the output, which has the shape of q.")
    k, v = zero_padded_keys(k, key_padding_mask), zero_padded_keys(v, key_padding_mask)
    weights = attention_weights(q, k, center_xy, precision_xy, size, key_padding_mask)  # [B, h, N, L]
    root_d = q.shape[-1] ** 0.5

    dv = np.swapaxes(weights, -1, -2) @ grad_out  # (7)
    dweights = grad_out @ np.swapaxes(v, -1, -2)  # (8)
    dlogits = weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True))  # (9) [B, h, N, L]
    dq = dlogits @ k / root_d  # (10)
    dk = np.swapaxes(dlogits, -1, -2) @ q / root_d  # (10)
    difference_xy = key_minus_center(center_xy, size)  # [B, h, N, L, 2]
    dcenter_xy = precision_xy * np.einsum("bhnl,bhnla->bhna", dlogits, difference_xy)  # (11)
    dprecision_xy = np.einsum("bhnl,bhnla->bhna", dlogits, -0.5 * difference_xy**2)  # (12)
    return dq, dk, dv, dcenter_xy, dprecision_xy


def multi_scale_smca_attention_vjp(
    grad_out: FloatArray, q: FloatArray, levels: Sequence[Level], level_weights: FloatArray
) -> tuple[FloatArray, list[tuple[FloatArray, FloatArray, FloatArray, FloatArray]], FloatArray]:
    """The backward pass of `multi_scale_smca_attention`. Equations (14) and (15), around (7) to (12).

    Args:
        grad_out: [B, h, N, d], the gradient of a scalar with respect to the output.
        q, levels, level_weights: as given to `multi_scale_smca_attention`.

    Returns:
        dq [B, h, N, d]; per level its dk, dv, dcenter_xy, dprecision_xy, shaped as in `Level`; dlevel_weights
        [B, N, J].

    Raises:
        ValueError: as `multi_scale_smca_attention`, or a `grad_out` that hasn't the shape of `q`.

    In the example above the weights' gradients are the levels' answers, and level 0's values get ¾ of (¼, ½, ¼):

    >>> q, k, v = np.zeros((1, 1, 1, 1)), np.ones((1, 1, 3, 1)), np.array([4.0, 8.0, 0.0]).reshape(1, 1, 3, 1)
    >>> center, precision = np.array([1.5, 0.5]).reshape(1, 1, 1, 2), np.full((1, 1, 1, 2), 2 * np.log(2))
    >>> levels = [Level(k, v, center, precision, (1, 3)), Level(q, q + 9.0, center / 3, precision, (1, 1))]
    >>> dq, per_level, dw = multi_scale_smca_attention_vjp(np.ones_like(q), q, levels, np.array([[[0.75, 0.25]]]))
    >>> dw.ravel().round(12).tolist(), per_level[0][1].ravel().round(12).tolist()
    ([5.0, 9.0], [0.1875, 0.375, 0.1875])
    """
    check_levels(q, levels, level_weights)
    require_shape("grad_out", grad_out, tuple(q.shape), "It is the gradient of the output, which has the shape of q.")
    dqs, per_level, dweights = [], [], []
    for j, level in enumerate(levels):
        grad_of_level = of_level(level_weights, j) * grad_out  # (14)
        dq, dk, dv, dcenter_xy, dprecision_xy = smca_attention_vjp(grad_of_level, q, *level)
        dqs.append(dq)
        per_level.append((dk, dv, dcenter_xy, dprecision_xy))
        dweights.append(np.einsum("bhnd,bhnd->bn", grad_out, smca_attention(q, *level)))  # (15)
    return np.sum(np.stack(dqs), axis=0), per_level, np.stack(dweights, axis=-1)
