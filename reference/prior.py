"""From a query's state to its Gaussians: one per head and level.

O [B, N, C] is the query's state (`decoder` (D1)), ref the logits of its reference box (D2). For head i and level j, in which
the unpadded image is w_j × h_j cells:

    (D3) c_ij   = σ(ref_xy)·(w_j, h_j) + offset_ij(O)        in cells
    (D4) r_ij   = scale head(O)                              1 / relative scale; 1 if fixed; one, or one per axis
    (D5) λ_ij   = 2·r_ij²/β_j = (r_ij·stride_j/σ_j)²         β_j = 2·(σ_j/stride_j)²: σ_j is the prior's width in pixels

As published, ref is that of the first layer in all layers (`decoder` (D2)): what changes from layer to layer is O. Beyond the
paper, with prior_unit="box", in cells of level j and with side_j = σ(ref)_wh·(w_j, h_j), (D3) and (D5) become

    (D12) c_ij = σ(ref_xy)·(w_j, h_j) + side_j·offset_ij(O)        λ_ij = (r_ij / max(0.3·side_j, ½))²

so that a query whose box is known looks as far as that box reaches. Sources: method.md §1, §3, §4 and §8; paper, "Dynamic
spatial weight maps" and "SMCA with multi-head modulation"; for the idea of (D12) DAB-DETR, arXiv 2201.12329, "modulated
attention".
"""

from collections.abc import Sequence

import numpy as np

from smca.reference.arrays import FloatArray
from smca.reference.config import ModelConfig, sigma_of_levels, uses_prior
from smca.reference.layers import Params, linear, sigmoid
from smca.reference.position import Grid

SIGMA_OF_SIDE = 0.3
"""Standard deviation of a Gaussian at r = 1, as a fraction of the box's side: (D12)."""
LEAST_SIGMA = 0.5
"""The same in cells, at least: nothing can be told apart within a cell."""


def spatial_prior(
    state: FloatArray,
    reference_logits: FloatArray,
    grids: Sequence[Grid],
    params: Params,
    name: str,
    config: ModelConfig,
) -> list[tuple[FloatArray, FloatArray]]:
    """Centre and precision of every query's Gaussians. Equations (D3), (D4), (D5), (D12); method.md §1, §3, §4 and §8.

    Args:
        state: O, [B, N, C].
        reference_logits: [B, N, 4]; width and height matter only with prior_unit="box".
        grids: the J levels.
        params, name: `name`.prior.offset_head and, unless fixed, `name`.prior.scale_head. Their outputs are, in this
            order, [g, J, 2] and [g, J, 1 or 2]: head first, then level, then x and y; g = h, or 1 if heads share.
        config: as configured.

    Returns:
        For each level center_xy [B, h, N, 2] in cells and precision_xy [B, h, N, 2] in cells⁻². Precisions of 0, and no
        parameter is read, if there is no prior.

    One head, whose offset is one cell to the right, on a map of 2 × 3 cells of stride 32, from the middle of the image and
    with r = 1 of a width of 64 pixels, two cells:

    >>> head = {"l.prior.offset_head.bias": np.array([1.0, 0.0]), "l.prior.scale_head.bias": np.ones(2)}
    >>> head |= {name.replace("bias", "weight"): np.zeros((2, 4)) for name in head}
    >>> grid = Grid((2, 3), 32, np.array([[2.0, 3.0]]), np.zeros((1, 6), bool), np.zeros((1, 6, 4)))
    >>> one_head = ModelConfig(hidden_dim=4, num_heads=1)
    >>> [prior] = spatial_prior(np.zeros((1, 1, 4)), np.zeros((1, 1, 4)), [grid], head, "l", one_head)
    >>> prior[0].ravel().tolist(), prior[1].ravel().tolist()
    ([2.5, 1.0], [0.25, 0.25])
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
    for j, (grid, sigma_px) in enumerate(zip(grids, sigma_of_levels(config), strict=True)):
        extent = grid.valid_cells[:, None, ::-1]  # (w_j, h_j) [B, 1, 2]
        unit_xy, sigma_xy = np.array(1.0), np.array(sigma_px / grid.stride)  # in cells
        if config.prior_unit == "box":  # (D12)
            unit_xy = (sigmoid(reference_logits[..., 2:]) * extent)[:, :, None, :]  # [B, N, 1, 2]
            sigma_xy = np.maximum(SIGMA_OF_SIDE * unit_xy, LEAST_SIGMA)
        center_xy = (sigmoid(reference_logits[..., :2]) * extent)[:, :, None, :]  # [B, N, 1, 2]
        center_xy = center_xy + unit_xy * offset_xy[:, :, :, j]  # (D3) [B, N, g, 2]
        precision_xy = (inverse_scale[:, :, :, j] / sigma_xy) ** 2  # (D5) [B, N, g, 1 or 2]
        priors.append((_for_heads(center_xy, config.num_heads), _for_heads(precision_xy, config.num_heads)))
    return priors


def _for_heads(values: FloatArray, num_heads: int) -> FloatArray:
    """[B, N, h or 1, 2 or 1] → [B, h, N, 2]: one value serves all heads, or both axes."""
    batch, queries = values.shape[:2]
    return np.broadcast_to(values, (batch, queries, num_heads, 2)).transpose(0, 2, 1, 3)
