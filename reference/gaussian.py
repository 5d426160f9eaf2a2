"""The Gaussian of a query over the map: the prior, before any attention.

A query has a reference centre c and a relative scale s (method.md §1). With keys at l, cells (x, y) = (column + ½,
row + ½):

    (1)  G(x, y) = exp( −(x − c_x)² / (β·s_x²) − (y − c_y)² / (β·s_y²) )      β: bandwidth in cells²
    (2)  λ = 2 / (β·s²)                                                       precision per axis, in cells⁻²
    (3)  log G = −½·λ_x·(x − c_x)² − ½·λ_y·(y − c_y)²                         the same Gaussian, without division

(3) is what the attention adds to its logits: it needs no division, and λ = 0 is no prior at all. (1) is for reading,
for pictures, and for testing (3) against.
"""

import numpy as np

from smca.reference.arrays import FloatArray


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


def key_minus_center(center_xy: FloatArray, size: tuple[int, int]) -> FloatArray:
    """p_l − c_n, from every centre to every key of a map, in cells: what equation (3) squares.

    Args:
        center_xy: [..., N, 2], (x, y) in cells.
        size: (H, W) of the map, L = H·W keys, row-major.

    Returns:
        [..., N, L, 2].

    >>> key_minus_center(np.array([[1.5, 0.0]]), (1, 2)).tolist()
    [[[-1.0, 0.5], [0.0, 0.5]]]
    """
    height, width = size
    key = np.arange(height * width, like=center_xy)  # row-major
    key_xy = np.stack([key % width + 0.5, key // width + 0.5], axis=-1)  # [L, 2]
    difference_xy: FloatArray = key_xy - center_xy[..., None, :]
    return difference_xy


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
