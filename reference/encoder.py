"""The encoder: the cells of an image learn of each other, within their level and across levels.

x_j [B, L_j, C] are the cells of level j, pos_j what tells their place; A is multi-head attention, ffn the feed-forward
network. A block mixes the cells of all levels (M), then changes each cell by itself. All levels share its parameters
(but for the kernels "own" of encoder="conv"):

    (E1) post-norm   x_j = norm1(x_j + M_j(x));                x_j = norm2(x_j + ffn(x_j))
         pre-norm    y_j = norm1(x_j);  x_j = x_j + M_j(y);    x_j = x_j + ffn(norm2(x_j))
         and, behind the last block of a pre-norm encoder, x_j = encoder.norm(x_j)

With attention, a level attends to itself, but in the blocks that the configuration names all levels are one sequence:

    (E2) M_j(x) = A(x_j + pos_j, x_j + pos_j, x_j)
    (E3) [M_0(x), M_1(x), …] = A(x + pos, x + pos, x)          x = [x_0, x_1, …], pos = [pos_0, pos_1, …]

The position encoding is added to queries and keys, never to values, and again in every block (DETR, "Transformer").
Convolutions in its place are in `encoder_conv`.

Sources: method.md §4; DETR, "Transformer", for one level; paper, "SMCA with multi-scale visual features", for (E3).
"""

from collections.abc import Sequence

import numpy as np

from smca.reference.arrays import FloatArray
from smca.reference.config import ModelConfig
from smca.reference.encoder_conv import exchange, pyramid_exchange, zero_padded_cells
from smca.reference.layers import Params, feed_forward, layer_norm, multi_head_attention
from smca.reference.position import Grid


def encoder(
    levels: Sequence[FloatArray], grids: Sequence[Grid], params: Params, config: ModelConfig
) -> list[FloatArray]:
    """All blocks. Equation (E1), and with encoder="conv" (C1) of `encoder_conv`.

    Args:
        levels: J arrays [B, L_j, C], finest level first.
        grids: where their cells are.
        params: with the names of `parameters.parameter_shapes`.
        config: as configured.

    Returns:
        J arrays [B, L_j, C].
    """
    levels = zero_padded_cells(levels, grids) if config.encoder == "conv" else list(levels)
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
    elif config.encoder == "pyramid_conv":
        mixed = pyramid_exchange(y, grids, params, f"{name}.conv")
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
    """All cells of all levels attend to each other. Equation (E3). J arrays [B, L_j, C] → the same.

    With queries of 0, every cell gets the mean of all cells but the padded one, here (1 + 3 + 8)/3:

    >>> names = [f"a.{x}_proj" for x in "qkv"] + ["a.out_proj"]
    >>> params = {f"{name}.weight": np.eye(1) * (name != "a.q_proj") for name in names}
    >>> params |= {f"{name}.bias": np.zeros(1) for name in names}
    >>> fine = Grid((1, 3), 16, np.array([[1.0, 2.0]]), np.array([[False, False, True]]), np.zeros((1, 3, 1)))
    >>> coarse = Grid((1, 1), 32, np.array([[0.5, 1.0]]), np.array([[False]]), np.zeros((1, 1, 1)))
    >>> cells = [np.array([[[1.0], [3.0], [100.0]]]), np.array([[[8.0]]])]
    >>> [x.ravel().tolist() for x in attend_across_levels(cells, [fine, coarse], params, "a", num_heads=1)]
    [[4.0, 4.0, 4.0], [4.0]]
    """
    x = np.concatenate(list(levels), axis=1)  # [B, L_0 + L_1 + …, C]
    position = np.concatenate([grid.position for grid in grids], axis=1)
    padding = np.concatenate([grid.key_padding_mask for grid in grids], axis=1)
    mixed = multi_head_attention(x + position, x + position, x, params, name, num_heads, padding)
    ends = np.cumsum([level.shape[1] for level in levels])
    return np.split(mixed, ends[:-1], axis=1)
