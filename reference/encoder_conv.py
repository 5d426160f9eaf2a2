"""How cells mix by convolution, with exchange between neighbouring levels: the authors' block, and one besides.

Each of the two is an M in equation (E1) of `encoder`. Cells are (row, column) here, x_j and pos_j as there; * is
depthwise, b a bias for each channel. What lies outside a map is 0, and a neighbour that doesn't exist adds nothing.

encoder="conv" is the authors' own. A level convolves its cells with a kernel of its own, and what comes of it is
exchanged by kernels that all levels share:

    (C1) x_j = 0 in padded cells                                  once, before the first block
    (C2) u_j = own_j * in_proj(x_j + pos_j) + b_own_j              in_proj linear, C → C; own_j 7 × 7, one for each level
    (C3) v_j(a, b) = u_j(a, b)
                   + (finer * u_{j−1} + b_finer)(2a, 2b)           7 × 7, read at every second cell only
                   + up_j(coarser * u_{j+1} + b_coarser)(a, b)     7 × 7
         M_j(x) = out_proj(v_j)                                   linear, C → C
    (C4) up_j(z)(a, b) = z(a·(H' − 1)/(H_j − 1), b·(W' − 1)/(W_j − 1))      z of H' × W' cells; bilinear between them

(C4) stretches a map to the size of a finer one, the first cell onto the first and the last onto the last (a map with
one row is repeated in all). A map must have half as many rows and columns as the next finer one, rounded up.
Padded cells are 0 at the start and nothing is masked after that, so what an image gives depends on how far it is padded,
by (C4) even if only the size of the maps differs. In training that is so, in evaluation the production model gives
each image maps of its own. Published are six blocks with a feed-forward of 1024, over levels of stride 8 to 64, with the
finest halved behind them (`model` (M6)).

encoder="pyramid_conv" is not theirs. All levels share its three kernels, and what an image gives is the same however far
it is padded. ρ_j = stride_j / stride_{j−1} of the finer cells, along each axis, lie in one of level j:

    (C5) y_j(a, b) = (own * x_j)(a, b)                              3 × 3, as the next two
                   + (finer * x_{j−1})(ρ_j·a, ρ_j·b)                read at every ρ_j-th cell only
                   + (coarser * x_{j+1})(⌊a / ρ_{j+1}⌋, ⌊b / ρ_{j+1}⌋)     the coarse cell that holds this one
         M_j(x) = out_proj(y_j)

In (C5) padded cells are 0 in every block, and a level's map need not be ρ times smaller than the next finer one: cells
correspond by index, from the top left corner, whatever the maps' sizes. A convolution knows what is beside what, so
(C5) needs no position encoding.

Sources: method.md §4; (C2) to (C4) the authors' archive of their multi-scale models, (C5) "Scale-Equalizing Pyramid
Convolution" (arXiv 2005.03101), with one kernel for each neighbour that the levels share, here depthwise.
"""

from collections.abc import Sequence

import numpy as np

from smca.reference.arrays import FloatArray
from smca.reference.layers import Params, cells_of_map, depthwise_convolution, linear, map_of_cells, zero_padded
from smca.reference.position import Grid


def zero_padded_cells(levels: Sequence[FloatArray], grids: Sequence[Grid]) -> list[FloatArray]:
    """0 in place of padded cells, whatever they hold. Equation (C1). J arrays [B, L_j, C] → the same."""
    return [np.where(grid.key_padding_mask[..., None], 0.0, x) for x, grid in zip(levels, grids, strict=True)]


def exchange(levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, name: str) -> list[FloatArray]:
    """The authors' block. Equations (C2) to (C4).

    Args:
        levels: J arrays [B, L_j, C].
        grids: where their cells are; each stride twice the one before, and each map half the one before, rounded up.
        params, name: `name`.own.0 and on, `name`.finer and `name`.coarser (depthwise 7 × 7; the last two where J > 1),
            and the linear maps `name`.in_proj and `name`.out_proj.

    Returns:
        J arrays [B, L_j, C].

    A row of three cells and its coarser level of two, with C = 1, no biases, no positions, and linear maps that change
    nothing. All kernels take the cell itself, but "own" of the coarse level, which doubles it: u is (1, 2, 4) and
    (20, 40). Fine cells 0 and 2 are added to the coarse ones. To the fine ones the coarse row is stretched: its first cell
    onto the first, its last onto the last, and 30 in between:

    >>> middle, none = np.zeros((1, 1, 7, 7)), np.zeros(1)
    >>> middle[..., 3, 3] = 1
    >>> kernels = {"own.0": middle, "own.1": 2 * middle, "finer": middle, "coarser": middle}
    >>> kernels |= {"in_proj": np.eye(1), "out_proj": np.eye(1)}
    >>> params = {f"e.{key}.weight": value for key, value in kernels.items()} | {f"e.{key}.bias": none for key in kernels}
    >>> def grid(columns, stride):
    ...     return Grid((1, columns), stride, np.array([[1, columns]]), np.zeros((1, columns), bool), np.zeros(1))
    >>> levels = [np.array([1.0, 2.0, 4.0]).reshape(1, 3, 1), np.array([10.0, 20.0]).reshape(1, 2, 1)]
    >>> fine, coarse = exchange(levels, [grid(3, 16), grid(2, 32)], params, "e")
    >>> fine.ravel().tolist(), coarse.ravel().tolist()
    ([21.0, 32.0, 44.0], [21.0, 44.0])
    """
    u = []
    for j, (x, grid) in enumerate(zip(levels, grids, strict=True)):
        mapped = linear(x + grid.position, params, f"{name}.in_proj")
        u.append(_with_bias(map_of_cells(mapped, grid.size), params, f"{name}.own.{j}"))  # (C2)
    mixed = []
    for j, grid in enumerate(grids):
        v = u[j]
        if j > 0:
            v = v + _with_bias(u[j - 1], params, f"{name}.finer", stride=2)  # (C3)
        if j + 1 < len(grids):
            v = v + stretch(_with_bias(u[j + 1], params, f"{name}.coarser"), grid.size)
        mixed.append(linear(cells_of_map(v), params, f"{name}.out_proj"))
    return mixed


def pyramid_exchange(
    levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, name: str
) -> list[FloatArray]:
    """Each level takes from itself and from its neighbours, whatever is padded. Equation (C5).

    Args:
        levels: J arrays [B, L_j, C]. Padded cells are never read: they may be NaN.
        grids: where their cells are; each stride a multiple of the one before.
        params, name: `name`.own, `name`.finer and `name`.coarser (depthwise 3 × 3; the last two where J > 1), and the
            linear map `name`.out_proj.

    Returns:
        J arrays [B, L_j, C].

    A row of three cells and its coarser level of two, with C = 1 and out_proj the identity. Own and coarser take the
    cell itself. Finer adds up three in a row, around fine cells 0 and 2, so the coarse cells become 10 + (0 + 1 + 2)
    and 20 + (2 + 4 + 0), and the fine ones 1 + 10, 2 + 10 and 4 + 20:

    >>> middle, row = np.zeros((1, 1, 3, 3)), np.zeros((1, 1, 3, 3))
    >>> middle[..., 1, 1], row[..., 1, :] = 1, 1
    >>> params = {"e.own.weight": middle, "e.finer.weight": row, "e.coarser.weight": middle}
    >>> params |= {"e.out_proj.weight": np.eye(1), "e.out_proj.bias": np.zeros(1)}
    >>> def grid(columns, stride):
    ...     return Grid((1, columns), stride, np.array([[1, columns]]), np.zeros((1, columns), bool), np.zeros(1))
    >>> levels = [np.array([1.0, 2.0, 4.0]).reshape(1, 3, 1), np.array([10.0, 20.0]).reshape(1, 2, 1)]
    >>> fine, coarse = pyramid_exchange(levels, [grid(3, 16), grid(2, 32)], params, "e")
    >>> fine.ravel().tolist(), coarse.ravel().tolist()
    ([11.0, 12.0, 24.0], [13.0, 26.0])
    """
    maps = [
        zero_padded(map_of_cells(x, grid.size), grid.key_padding_mask) for x, grid in zip(levels, grids, strict=True)
    ]
    mixed = []
    for j, grid in enumerate(grids):
        y = depthwise_convolution(maps[j], params, f"{name}.own")
        if j > 0:
            ratio = grid.stride // grids[j - 1].stride
            y = y + fit(depthwise_convolution(maps[j - 1], params, f"{name}.finer", stride=ratio), grid.size)
        if j + 1 < len(grids):
            ratio = grids[j + 1].stride // grid.stride
            coarse = depthwise_convolution(maps[j + 1], params, f"{name}.coarser")
            y = y + fit(coarse.repeat(ratio, axis=2).repeat(ratio, axis=3), grid.size)
        mixed.append(linear(cells_of_map(y), params, f"{name}.out_proj"))
    return mixed


def stretch(x: FloatArray, size: tuple[int, int]) -> FloatArray:
    """[B, C, H', W'] → [B, C, H, W] with (H, W) = `size`: first cell onto first, last onto last. Equation (C4).

    >>> stretch(np.array([[[[0.0, 6.0]]]]), (1, 5)).tolist()
    [[[[0.0, 1.5, 3.0, 4.5, 6.0]]]]
    """
    rows, columns = (_shares(count, of) for count, of in zip(size, x.shape[2:], strict=True))
    stretched: FloatArray = rows @ x @ columns.T
    return stretched


def fit(x: FloatArray, size: tuple[int, int]) -> FloatArray:
    """[B, C, H', W'] → [B, C, H, W] with (H, W) = `size`: cells beyond it dropped, cells missing 0, on the right and below.

    >>> fit(np.array([[[[1.0, 2.0, 3.0]]]]), (2, 2)).tolist()
    [[[[1.0, 2.0], [0.0, 0.0]]]]
    """
    kept = x[:, :, : size[0], : size[1]]
    rows, columns = size[0] - kept.shape[2], size[1] - kept.shape[3]
    return np.pad(kept, ((0, 0), (0, 0), (0, rows), (0, columns)))


def _shares(count: int, of: int) -> FloatArray:
    """What each of `count` cells in a row takes from each of the `of` that are stretched to them: [count, of], sums of 1.

    1 at a cell's own place, falling along a line to 0 at the next cell's.
    """
    place = np.arange(count) * (of - 1) / max(1, count - 1)
    return np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(of)))


def _with_bias(x: FloatArray, params: Params, name: str, stride: int = 1) -> FloatArray:
    """depthwise_convolution(x) + `name`.bias [C]."""
    return depthwise_convolution(x, params, name, stride) + params[f"{name}.bias"][:, None, None]
