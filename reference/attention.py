"""Spatially modulated co-attention of one feature level: the method itself, forward and backward.

A query has a reference centre c and a relative scale s. From them comes a Gaussian over the map, and its logarithm is
added to the query's attention logits (method.md §1 to §3). With keys at l, cells (x, y) = (column + ½, row + ½):

    (1)  G(x, y) = exp( −(x − c_x)² / (β·s_x²) − (y − c_y)² / (β·s_y²) )      β: bandwidth in cells²
    (2)  λ = 2 / (β·s²)                                                       precision per axis, in cells⁻²
    (3)  log G = −½·λ_x·(x − c_x)² − ½·λ_y·(y − c_y)²                         the same Gaussian, without division
    (4)  S_nl = q_n·k_l / √d + log G_n(l)                                     −∞ where key l is padded
    (5)  A_nl = exp(S_nl) / Σ_l' exp(S_nl')                                   softmax over the keys
    (6)  O_n = Σ_l A_nl·v_l

and, for a gradient Ō of the loss with respect to O, by the chain rule from (6) back to (2):

    (7)  v̄_l  = Σ_n A_nl·Ō_n                                                  from (6)
    (8)  Ā_nl = Ō_n·v_l                                                       from (6)
    (9)  S̄_nl = A_nl·( Ā_nl − Σ_l' A_nl'·Ā_nl' )                              from (5)
    (10) q̄_n  = Σ_l S̄_nl·k_l / √d          k̄_l = Σ_n S̄_nl·q_n / √d            from (4)
    (11) c̄_n  = Σ_l S̄_nl·λ_n·(p_l − c_n)                                      from (3), per axis, p_l = (x, y) of key l
    (12) λ̄_n  = Σ_l S̄_nl·( −½·(p_l − c_n)² )                                  from (3), per axis

Three things to notice. λ = 0 makes (4) DETR's plain attention, exactly. G enters its own head only, so "one head" is
h = 1 and "multi-head modulation" is every h. And what softmax drops in (5) is dropped in (9): S̄ sums to 0 over the
keys, so a term that is the same for all keys gets no gradient.

Everything here speaks NumPy's dispatch protocols and never converts its inputs: given CuPy arrays, the same code runs
on a GPU. Cell coordinates are float64, so float32 inputs are promoted when they meet them. Paper: "Dynamic spatial
weight maps", "Spatially-modulated co-attention", "SMCA with multi-head modulation".
"""

import numpy as np

from smca.reference.arrays import BoolArray, FloatArray, require_shape


def gaussian_weight_map(center_xy: FloatArray, scale_xy: FloatArray, beta: float, size: tuple[int, int]) -> FloatArray:
    """The Gaussian of each query over the map. Equation (1); method.md §1; paper, "Dynamic spatial weight maps".

    Args:
        center_xy: [..., 2], (x, y) in cells. May lie outside the map.
        scale_xy: [..., 2], relative width and height, > 0: the standard deviation is s·√(β/2) cells.
        beta: bandwidth in cells², > 0.
        size: (H, W) of the map.

    Returns:
        [..., H, W], 1 at the centre, in (0, 1] (far away it underflows to 0).

    Raises:
        ValueError: a last axis other than 2, leading axes that don't broadcast, or a scale or bandwidth ≤ 0.

    A query at the centre of a 1 × 3 map, with β = 2 and s = 1, so with a standard deviation of one cell, gives its
    neighbours exp(−½):

    >>> gaussian_weight_map(np.array([1.5, 0.5]), np.array([1.0, 1.0]), 2.0, (1, 3)).round(4).tolist()
    [[0.6065, 1.0, 0.6065]]
    """
    _check_scale(scale_xy, beta)
    _check_pairs("center_xy", center_xy)
    try:
        np.broadcast_shapes(center_xy.shape, scale_xy.shape)
    except ValueError as error:
        raise ValueError(
            f"center_xy and scale_xy: expected shapes that broadcast, got {center_xy.shape} and {scale_xy.shape}. "
            "Give every centre its own scale, or all the same."
        ) from error
    height, width = size
    column_x = np.arange(width, like=center_xy) + 0.5  # [W]
    row_y = np.arange(height, like=center_xy) + 0.5  # [H]
    distance_x = (column_x - center_xy[..., 0, None]) ** 2 / (beta * scale_xy[..., 0, None] ** 2)  # [..., W]
    distance_y = (row_y - center_xy[..., 1, None]) ** 2 / (beta * scale_xy[..., 1, None] ** 2)  # [..., H]
    weights: FloatArray = np.exp(-distance_x[..., None, :] - distance_y[..., :, None])
    return weights


def precision_from_scale(scale_xy: FloatArray, beta: float) -> FloatArray:
    """The precision (inverse variance) λ of the Gaussian. Equation (2); method.md §1.

    Args:
        scale_xy: [..., 2], relative width and height, > 0.
        beta: bandwidth in cells², > 0.

    Returns:
        [..., 2] in cells⁻². The model predicts r = 1/s instead and uses λ = 2·r²/β, which is also defined at r = 0.

    Raises:
        ValueError: a last axis other than 2, or a scale or bandwidth ≤ 0.

    With β = 8 the standard deviation at s = 1 is √(8/2) = 2 cells, and the precision 1/2² = 0.25:

    >>> precision_from_scale(np.array([1.0, 2.0]), 8.0).tolist()
    [0.25, 0.0625]
    """
    _check_scale(scale_xy, beta)
    return 2.0 / (beta * scale_xy**2)


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
    _check_attention_shapes(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    k, v = _zero_padded(k, key_padding_mask), _zero_padded(v, key_padding_mask)
    weights = _attention_weights(q, k, center_xy, precision_xy, size, key_padding_mask)
    return weights @ v  # (6)


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
    _check_attention_shapes(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    require_shape("grad_out", grad_out, tuple(q.shape), "It is the gradient of the output, which has the shape of q.")
    k, v = _zero_padded(k, key_padding_mask), _zero_padded(v, key_padding_mask)
    weights = _attention_weights(q, k, center_xy, precision_xy, size, key_padding_mask)  # [B, h, N, L]
    root_d = q.shape[-1] ** 0.5

    dv = np.swapaxes(weights, -1, -2) @ grad_out  # (7)
    dweights = grad_out @ np.swapaxes(v, -1, -2)  # (8)
    dlogits = weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True))  # (9) [B, h, N, L]
    dq = dlogits @ k / root_d  # (10)
    dk = np.swapaxes(dlogits, -1, -2) @ q / root_d  # (10)
    difference_xy = _key_minus_center(center_xy, size)  # [B, h, N, L, 2]
    dcenter_xy = precision_xy * np.einsum("bhnl,bhnla->bhna", dlogits, difference_xy)  # (11)
    dprecision_xy = np.einsum("bhnl,bhnla->bhna", dlogits, -0.5 * difference_xy**2)  # (12)
    return dq, dk, dv, dcenter_xy, dprecision_xy


def _attention_weights(
    q: FloatArray,
    k: FloatArray,
    center_xy: FloatArray,
    precision_xy: FloatArray,
    size: tuple[int, int],
    key_padding_mask: BoolArray | None,
) -> FloatArray:
    """A [B, h, N, L]: equations (3), (4) and (5). `k` is 0 at padded keys."""
    squared_xy = _key_minus_center(center_xy, size) ** 2  # [B, h, N, L, 2]
    log_prior = -0.5 * np.einsum("bhna,bhnla->bhnl", precision_xy, squared_xy)  # (3)
    logits = q @ np.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5 + log_prior  # (4)
    if key_padding_mask is not None:
        logits = np.where(key_padding_mask[:, None, None, :], -np.inf, logits)
    # Softmax doesn't see a constant; taking the largest logit off keeps every exponential at most 1.
    exponentials = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    weights: FloatArray = exponentials / np.sum(exponentials, axis=-1, keepdims=True)  # (5)
    return weights


def _key_minus_center(center_xy: FloatArray, size: tuple[int, int]) -> FloatArray:
    """p_l − c_n in cells: [..., N, 2] and a map of L = H·W keys → [..., N, L, 2]."""
    height, width = size
    key = np.arange(height * width, like=center_xy)  # row-major
    key_xy = np.stack([key % width + 0.5, key // width + 0.5], axis=-1)  # [L, 2]
    difference_xy: FloatArray = key_xy - center_xy[..., None, :]
    return difference_xy


def _zero_padded(keys: FloatArray, key_padding_mask: BoolArray | None) -> FloatArray:
    """Put 0 where a key is padded. A weight of 0 alone would not do: 0·NaN is NaN."""
    if key_padding_mask is None:
        return keys
    zeroed: FloatArray = np.where(key_padding_mask[:, None, :, None], 0.0, keys)
    return zeroed


def _check_pairs(name: str, pairs_xy: FloatArray) -> None:
    if pairs_xy.ndim == 0 or pairs_xy.shape[-1] != 2:
        raise ValueError(f"{name}: expected shape (..., 2), got {pairs_xy.shape}. Put x and y on the last axis.")


def _check_scale(scale_xy: FloatArray, beta: float) -> None:
    _check_pairs("scale_xy", scale_xy)
    if not beta > 0:
        raise ValueError(f"beta: expected a bandwidth > 0 in cells², got {beta}.")
    if bool(np.any(scale_xy <= 0)):
        raise ValueError(
            "scale_xy: expected every scale > 0, got one that is not. A Gaussian of no width has no weight map; for "
            "no modulation at all, give smca_attention a precision of 0."
        )


def _check_attention_shapes(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    center_xy: FloatArray,
    precision_xy: FloatArray,
    size: tuple[int, int],
    key_padding_mask: BoolArray | None,
) -> None:
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size: expected (H, W) with both ≥ 1, got {size}. An attention needs a key.")
    require_shape("q", q, (None, None, None, None), "Give it as [B, h, N, d].")
    b, h, n, d = q.shape
    keys = height * width
    mend = f"size is (H, W) = {(height, width)}, so there are {keys} keys, and q is [B, h, N, d] = {(b, h, n, d)}."
    require_shape("k", k, (b, h, keys, d), mend)
    require_shape("v", v, (b, h, keys, d), mend)
    require_shape("center_xy", center_xy, (b, h, n, 2), mend)
    require_shape("precision_xy", precision_xy, (b, h, n, 2), mend)
    if key_padding_mask is not None:
        require_shape("key_padding_mask", key_padding_mask, (b, keys), mend)
        if key_padding_mask.dtype != np.bool_:
            raise ValueError(
                f"key_padding_mask: expected dtype bool (True = padded), got {key_padding_mask.dtype}. "
                "An additive mask is not one; compare it with 0 first."
            )
        if bool(np.any(np.all(key_padding_mask, axis=-1))):
            raise ValueError(
                "key_padding_mask: expected a key that is not padded in every image, got an image with none. "
                "Check that valid_sizes are (height, width) in pixels and that padding is True."
            )
