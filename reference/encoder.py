"""The encoder: the cells of an image learn of each other, within their level and across levels.

x_j [B, L_j, C] are the cells of level j, pos_j what tells their place; A is multi-head attention, ffn the feed-forward
network. A block mixes the cells of all levels (M), then changes each cell by itself. All levels share its parameters:

    (E1) post-norm   x_j = norm1(x_j + M_j(x));                x_j = norm2(x_j + ffn(x_j))
         pre-norm    y_j = norm1(x_j);  x_j = x_j + M_j(y);    x_j = x_j + ffn(norm2(x_j))
         and, behind the last block of a pre-norm encoder, x_j = encoder.norm(x_j)

With attention, a level attends to itself, but in the blocks that the configuration names all levels are one sequence:

    (E2) M_j(x) = A(x_j + pos_j, x_j + pos_j, x_j)
    (E3) [M_0(x), M_1(x), …] = A(x + pos, x + pos, x)          x = [x_0, x_1, …], pos = [pos_0, pos_1, …]

The position encoding is added to queries and keys, never to values, and again in every block (DETR, "Transformer").
With convolutions, each level takes from itself, from its finer and from its coarser neighbour. Cells are (row, column)
here; ρ_j = stride_j / stride_{j−1} of the finer cells, along each axis, lie in one of level j; * is depthwise:

    (E4) y_j(a, b) = (own * x_j)(a, b)
                   + (finer * x_{j−1})(ρ_j·a, ρ_j·b)                            read at every ρ_j-th cell only
                   + (coarser * x_{j+1})(⌊a / ρ_{j+1}⌋, ⌊b / ρ_{j+1}⌋)           the coarse cell that holds this one
         M_j(x) = out_proj(y_j)                                                linear, C → C

What lies outside a map and what is padded is 0 in (E4), a neighbour that doesn't exist adds nothing, and a level's map
need not be ρ times smaller than the next finer one: cells correspond by index, from the top left corner, whatever
the maps' sizes, so that an image gives the same whatever padding it is given. A convolution knows what is beside what,
so (E4) needs no position encoding.

Sources: method.md §4; DETR, "Transformer", for one level; paper, "SMCA with multi-scale visual features", for (E3). The
convolutions of (E4), one kernel for each neighbour and shared by the levels, are those of "Scale-Equalizing Pyramid
Convolution" (arXiv 2005.03101), here depthwise.
"""

from collections.abc import Sequence

import numpy as np

from smca.reference.arrays import FloatArray
from smca.reference.config import ModelConfig
from smca.reference.layers import (
    Params,
    cells_of_map,
    depthwise_convolution,
    feed_forward,
    layer_norm,
    linear,
    map_of_cells,
    multi_head_attention,
    zero_padded,
)
from smca.reference.position import Grid


def encoder(
    levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, config: ModelConfig
) -> list[FloatArray]:
    """All blocks. Equation (E1).

    Args:
        levels: J arrays [B, L_j, C], finest level first.
        grids: where their cells are.
        params: with the names of `parameters.parameter_shapes`.
        config: as configured.

    Returns:
        J arrays [B, L_j, C].
    """
    levels = list(levels)
    for index in range(config.encoder_layers):
        levels = encoder_block(levels, grids, params, index, config)
    return [layer_norm(x, params, "encoder.norm") for x in levels] if config.pre_norm else levels


def encoder_block(
    levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, index: int, config: ModelConfig
) -> list[FloatArray]:
    """Block `index`, with the parameters `encoder.layers.<index>`: norm1, norm2, linear1, linear2, and `self_attn` or
    `conv`. Equation (E1); arguments and result as of `encoder`.
    """
    name = f"encoder.layers.{index}"
    y = [layer_norm(x, params, f"{name}.norm1") for x in levels] if config.pre_norm else list(levels)
    if config.encoder == "conv":
        mixed = exchange(y, grids, params, f"{name}.conv")
    elif index in config.cross_level_blocks:
        mixed = attend_across_levels(y, grids, params, f"{name}.self_attn", config.num_heads)
    else:
        mixed = attend_within_levels(y, grids, params, f"{name}.self_attn", config.num_heads)
    levels = [x + m for x, m in zip(levels, mixed, strict=True)]
    if config.pre_norm:
        return [x + feed_forward(layer_norm(x, params, f"{name}.norm2"), params, name) for x in levels]
    levels = [layer_norm(x, params, f"{name}.norm1") for x in levels]
    return [layer_norm(x + feed_forward(x, params, name), params, f"{name}.norm2") for x in levels]


def attend_within_levels(
    levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, name: str, num_heads: int
) -> list[FloatArray]:
    """Each level attends to itself. Equation (E2). J arrays [B, L_j, C] → the same."""
    return [
        multi_head_attention(x + grid.position, x + grid.position, x, params, name, num_heads, grid.key_padding_mask)
        for x, grid in zip(levels, grids, strict=True)
    ]


def attend_across_levels(
    levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, name: str, num_heads: int
) -> list[FloatArray]:
    """All cells of all levels attend to each other. Equation (E3). J arrays [B, L_j, C] → the same."""
    x = np.concatenate(list(levels), axis=1)  # [B, L_0 + L_1 + …, C]
    position = np.concatenate([grid.position for grid in grids], axis=1)
    padding = np.concatenate([grid.key_padding_mask for grid in grids], axis=1)
    mixed = multi_head_attention(x + position, x + position, x, params, name, num_heads, padding)
    ends = np.cumsum([level.shape[1] for level in levels])
    return np.split(mixed, ends[:-1], axis=1)


def exchange(levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, name: str) -> list[FloatArray]:
    """Each level takes from itself and from its neighbours, by depthwise convolution. Equation (E4).

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
    >>> fine, coarse = exchange(levels, [grid(3, 16), grid(2, 32)], params, "e")
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


def fit(x: FloatArray, size: tuple[int, int]) -> FloatArray:
    """[B, C, H', W'] → [B, C, H, W] with (H, W) = `size`: cells beyond it dropped, cells missing 0, on the right and below.

    >>> fit(np.array([[[[1.0, 2.0, 3.0]]]]), (2, 2)).tolist()
    [[[[1.0, 2.0], [0.0, 0.0]]]]
    """
    kept = x[:, :, : size[0], : size[1]]
    rows, columns = size[0] - kept.shape[2], size[1] - kept.shape[3]
    return np.pad(kept, ((0, 0), (0, 0), (0, rows), (0, columns)))
