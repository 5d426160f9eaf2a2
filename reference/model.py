"""From a backbone's features to class logits and boxes.

    (M1) (h_j, w_j) = valid size / stride_j, padding_j               the image in cells of level j (`position` (P1), (P2))
    (M2) x_j = input_proj_j(features_j)                              1 × 1 convolution: a linear map of each cell
    (M3) x_j = input_proj_j(x_{j−1})                                 levels beyond the backbone's: 3 × 3, stride 2
    (M4) pos_j = sine encoding of the cells (`position` (P3) to (P5))  + level_embed_j, where attention mixes several levels
    (M5) x = encoder (`encoder`)
    (M6) z, boxes = decoder (`decoder`);  logits = z, or from z as `softmax_scores` (K3) says, with class_scores="softmax"
    (M7) cells = dense head (`dense_head`), and the best cells are where the decoder's queries start    beyond the paper

A backbone gives a map for each of the first levels. Each level beyond them is made from the level before it (M3), with 0
in place of padded cells, and has twice its stride. (Of the projected level, C → C. Read from a ResNet-50's last stage,
2048 → C, this convolution alone would have 4.7 M parameters, more than the published 40 M leave room for.)

The parameters are those of the production model's state_dict, by name and shape (`parameters`). Sources: method.md;
DETR, "DETR architecture"; paper, the whole of its method section.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, require_shape
from smca.reference.config import ModelConfig, embeds_levels
from smca.reference.decoder import FurtherQueries, decoder
from smca.reference.dense_head import dense_head, select_queries
from smca.reference.encoder import encoder
from smca.reference.layers import Params, cells_of_map, convolution, sigmoid, zero_padded
from smca.reference.parameters import checked_parameters, parameter_shapes
from smca.reference.position import Grid, key_padding_mask, sine_position_encoding
from smca.reference.softmax_scores import log_odds


def forward(
    params: Mapping[str, npt.ArrayLike],
    features: Sequence[npt.ArrayLike],
    valid_sizes: npt.ArrayLike,
    config: ModelConfig,
    further: FurtherQueries | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """The model in evaluation mode. Equations (M1) to (M7).

    Args:
        params: named and shaped as in `parameters.parameter_shapes`. Keys that begin with "backbone." are ignored.
        features: the backbone's maps, [B, C_j, H_j, W_j], for the first of config.strides, at least one. Padded cells
            may hold anything, NaN included.
        valid_sizes: [B, 2], (height, width) of the unpadded images in pixels of the network's input.
        config: as configured.
        further: queries beside the model's own, as training has them with denoising_groups > 0.

    Returns:
        "logits" [M, B, N, K] and "boxes" [M, B, N, 4] (cxcywh in [0, 1] of the unpadded image), M decoder layers, the
        last one being the answer. With class_scores="softmax" also "class_logits" [M, B, N, K + 1], z, the last one "no
        object". With further queries "further_logits" and "further_boxes" likewise. With a dense head
        "cell_logits" [B, ΣL, K], "cell_boxes" and "cell_anchors" [B, ΣL, 4] (cxcywh, likewise), "cell_padding" [B, ΣL].

    Raises:
        ValueError: a parameter missing, misshapen or not of this configuration; features or valid sizes of another number
            or shape; an image that doesn't fit a map.
    """
    maps = [np.asarray(each, dtype=np.float64) for each in features]
    for j, each in enumerate(maps):
        require_shape(f"features[{j}]", each, (len(maps[0]), None, None, None), "Give maps, each [B, C_j, H_j, W_j].")
    weights = checked_parameters(params, parameter_shapes(config, [each.shape[1] for each in maps]))
    sizes = [(each.shape[2], each.shape[3]) for each in maps]
    while len(sizes) < len(config.strides):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))  # what a stride of 2 leaves
    grids = _grids(np.asarray(valid_sizes, dtype=np.float64), len(maps[0]), sizes, weights, config)  # (M1), (M4)
    memory = encoder(project(maps, grids, weights), grids, weights, config)  # (M5)
    cells = dense_head(memory, grids, weights) if config.dense_head else None  # (M7)
    selected = None
    if cells is not None and config.query_init == "selected":
        selected = select_queries(cells, grids, config.num_queries)
    z, boxes = decoder(memory, grids, weights, config, selected, further)  # (M6)
    logits = log_odds(z) if config.class_scores == "softmax" else z

    n = config.num_queries
    outputs: dict[str, npt.NDArray[Any]] = {"logits": logits[:, :, :n], "boxes": boxes[:, :, :n]}
    if config.class_scores == "softmax":
        outputs["class_logits"] = z[:, :, :n]
    if further is not None:
        outputs |= {"further_logits": logits[:, :, n:], "further_boxes": boxes[:, :, n:]}
    if cells is not None:
        outputs |= {"cell_logits": cells.logits, "cell_boxes": sigmoid(cells.box_logits)}
        outputs |= {"cell_anchors": cells.anchors, "cell_padding": cells.padding}
    return outputs


def project(features: Sequence[FloatArray], grids: Sequence[Grid], params: Params) -> list[FloatArray]:
    """Every level with C channels. Equations (M2) and (M3).

    Args:
        features: [B, C_j, H_j, W_j] for the first levels.
        grids: where the cells of all J levels are.
        params: input_proj.0 and on.

    Returns:
        J arrays [B, L_j, C].
    """
    maps: list[FloatArray] = []
    for j in range(len(grids)):
        if j < len(features):
            maps.append(convolution(features[j], params, f"input_proj.{j}"))  # (M2)
        else:
            source = zero_padded(maps[-1], grids[j - 1].key_padding_mask)
            maps.append(convolution(source, params, f"input_proj.{j}", stride=2))  # (M3)
    return [cells_of_map(x) for x in maps]


def _grids(
    valid_sizes: FloatArray, batch: int, sizes: Sequence[tuple[int, int]], params: Params, config: ModelConfig
) -> list[Grid]:
    """(M1) and (M4), with a check that images and maps belong together: [B, 2] pixels → where the cells of each level are."""
    require_shape("valid_sizes", valid_sizes, (batch, 2), "Give (height, width) in pixels, one row per image.")
    grids = []
    for j, (size, stride) in enumerate(zip(sizes, config.strides, strict=True)):
        valid_cells = valid_sizes / stride
        # A backbone may drop up to the last cell where a side is no multiple of the stride, but not more than that.
        fits = (valid_cells > 0) & (valid_cells < np.array(size) + 1)
        if not fits.all():
            image = int(np.argwhere(~fits)[0, 0])
            raise ValueError(
                f"valid_sizes[{image}]: expected (height, width) in pixels of an image that a map of {size} cells with "
                f"a stride of {stride} (level {j}) can hold, got {valid_sizes[image].tolist()}. Check the order, the "
                "unit and config.strides."
            )
        position = sine_position_encoding(size, valid_cells, config.hidden_dim)
        if embeds_levels(config):
            position = position + params["level_embed"][j]
        grids.append(Grid(size, stride, valid_cells, key_padding_mask(valid_cells, size), position))
    return grids
