"""From a backbone's features to class logits and boxes.

    (M1) (h_j, w_j) = valid size / stride_j, padding_j               the image in cells (`position` (P1), (P2) or (P7))
    (M2) x_j = input_proj_j(features_j)                              1 × 1 convolution: a linear map of each cell
    (M3) x_j = input_proj_j(features_last)                         first level beyond the backbone's: 3 × 3, stride 2
         x_j = input_proj_j(x_{j−1})                                levels beyond that, likewise
    (M4) pos_j = encoding of the cells (`position` (P3) to (P5), or (P8))     + level_embed_j, where an encoder reads several levels
    (M5) x = encoder (`encoder`)
    (M6) x_0 = halve(x_0)                                          an option: 3 × 3, stride 2, C → C
    (M7) z, boxes = decoder (`decoder`);  logits = z, or from z as `softmax_scores` (K3) says, with class_scores="softmax"
    (M8) cells = dense head (`dense_head`), and the best cells are where the decoder's queries start    beyond the paper

A backbone gives a map for each of the first levels. Of those beyond them, the first is made from the backbone's last map,
all its channels (2048 → C in a ResNet-50), any further one from the level before it; each has twice the stride of the one
before. Behind (M6) level 0 has twice its stride, with the cells, the mask and the positions of that stride. Padded cells
are 0 before (M3) and before (M6).

The parameters are those of the production model's state_dict, by name and shape (`parameters`). Sources: method.md;
DETR, "DETR architecture"; paper, the whole of its method section; (M3) and (M6) the authors' archive.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, require_shape
from smca.reference.config import ModelConfig, decoder_strides, embeds_levels
from smca.reference.decoder import FurtherQueries, decoder
from smca.reference.dense_head import dense_head, select_queries
from smca.reference.encoder import encoder
from smca.reference.layers import Params, cells_of_map, convolution, map_of_cells, sigmoid, zero_padded
from smca.reference.parameters import checked_parameters, parameter_shapes
from smca.reference.position import (
    Grid,
    counted_position_encoding,
    key_padding_mask,
    nearest_padding_mask,
    sine_position_encoding,
)
from smca.reference.softmax_scores import log_odds


def forward(
    params: Mapping[str, npt.ArrayLike],
    features: Sequence[npt.ArrayLike],
    valid_sizes: npt.ArrayLike,
    config: ModelConfig,
    further: FurtherQueries | None = None,
    padded_size: tuple[int, int] | None = None,
    given: Sequence[FloatArray] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """The model in evaluation mode. Equations (M1) to (M8).

    Args:
        params: named and shaped as in `parameters.parameter_shapes`. Keys that begin with "backbone." are ignored.
        features: the backbone's maps, [B, C_j, H_j, W_j], for the first of config.strides, at least one. Padded cells
            may hold anything, NaN included.
        valid_sizes: [B, 2], (height, width) of the unpadded images in pixels of the network's input.
        config: as configured.
        further: queries beside the model's own, as training has them with denoising_groups > 0.
        padded_size: (height, width) in pixels that all images were padded to; None = to be treated as if each were alone.
            Read with padding_cells="nearest" only.
        given: box logits that queries take as given, as `decoder.decoder` takes them: for derivatives by differences.

    Returns:
        "logits" [M, B, N, K] and "boxes" [M, B, N, 4] (cxcywh in [0, 1] of the unpadded image), M decoder layers, the
        last one being the answer. With class_scores="softmax" also "class_logits" [M, B, N, K + 1], z, the last one "no
        object". With further queries "further_logits" and "further_boxes" likewise. With a dense head
        "cell_logits" [B, ΣL, K], "cell_boxes" and "cell_anchors" [B, ΣL, 4] (cxcywh, likewise), "cell_padding" [B, ΣL].

    Raises:
        ValueError: a parameter missing, misshapen or not of this configuration; features or valid sizes of another number
            or shape; an image that doesn't fit a map; maps that don't halve with encoder="conv".
    """
    maps = [np.asarray(each, dtype=np.float64) for each in features]
    for j, each in enumerate(maps):
        require_shape(f"features[{j}]", each, (len(maps[0]), None, None, None), "Give maps, each [B, C_j, H_j, W_j].")
    weights = checked_parameters(params, parameter_shapes(config, [each.shape[1] for each in maps]))
    sizes = [(each.shape[2], each.shape[3]) for each in maps]
    while len(sizes) < len(config.strides):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))  # what a stride of 2 leaves
    if config.encoder == "conv":
        _check_halves(sizes)
    valid = np.asarray(valid_sizes, dtype=np.float64)
    grids = _grids(valid, len(maps[0]), sizes, weights, config, padded_size)  # (M1), (M4)
    memory = encoder(project(maps, grids, weights), grids, weights, config)  # (M5)
    if config.halve_finest:
        memory, grids = halve(memory, grids, weights, config, padded_size)  # (M6)
    cells = dense_head(memory, grids, weights) if config.dense_head else None  # (M8)
    selected = None
    if cells is not None and config.query_init == "selected":
        selected = select_queries(cells, grids, config.num_queries)
    z, boxes = decoder(memory, grids, weights, config, selected, further, given)  # (M7)
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
            before = features[-1] if j == len(features) else maps[-1]
            source = zero_padded(before, grids[j - 1].key_padding_mask)
            maps.append(convolution(source, params, f"input_proj.{j}", stride=2))  # (M3)
    return [cells_of_map(x) for x in maps]


def halve(
    memory: Sequence[FloatArray],
    grids: Sequence[Grid],
    params: Params,
    config: ModelConfig,
    padded_size: tuple[int, int] | None = None,
) -> tuple[list[FloatArray], list[Grid]]:
    """The finest level at twice its stride. Equation (M6).

    Args:
        memory: J arrays [B, L_j, C], the encoder's output.
        grids: where its cells are.
        params: halve.
        config: as configured.
        padded_size: as of `forward`.

    Returns:
        What decoder and dense head read in their place: level 0 of ⌈H/2⌉ × ⌈W/2⌉ cells, the others as they were.
    """
    source = zero_padded(map_of_cells(memory[0], grids[0].size), grids[0].key_padding_mask)
    halved = convolution(source, params, "halve", stride=2)
    size, stride = (halved.shape[2], halved.shape[3]), decoder_strides(config)[0]
    grid = _grid(grids[0].valid_cells * grids[0].stride, size, stride, 0, params, config, padded_size)
    return [cells_of_map(halved), *memory[1:]], [grid, *grids[1:]]


def _check_halves(sizes: Sequence[tuple[int, int]]) -> None:
    for j in range(1, len(sizes)):
        half = (-(-sizes[j - 1][0] // 2), -(-sizes[j - 1][1] // 2))
        if sizes[j] != half:
            raise ValueError(
                f'features[{j}]: expected a map of {half} cells with encoder="conv", half of the {sizes[j - 1]} of the level '
                f"before it, rounded up, got {sizes[j]}. Other encoders take maps of any sizes."
            )


def _grids(
    valid_sizes: FloatArray,
    batch: int,
    sizes: Sequence[tuple[int, int]],
    params: Params,
    config: ModelConfig,
    padded_size: tuple[int, int] | None,
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
        grids.append(_grid(valid_sizes, size, stride, j, params, config, padded_size))
    return grids


def _grid(
    valid_sizes: FloatArray,
    size: tuple[int, int],
    stride: int,
    level: int,
    params: Params,
    config: ModelConfig,
    padded_size: tuple[int, int] | None,
) -> Grid:
    """(M1) and (M4) of one level."""
    valid_cells = valid_sizes / stride
    if config.padding_cells == "nearest" and padded_size is not None:
        padding = nearest_padding_mask(valid_sizes, padded_size, size)
    else:
        padding = key_padding_mask(valid_cells, size)
    if config.position_encoding == "detr":
        position = counted_position_encoding(padding, size, config.hidden_dim)
    else:
        position = sine_position_encoding(size, valid_cells, config.hidden_dim)
    if embeds_levels(config):
        position = position + params["level_embed"][level]
    return Grid(size, stride, valid_cells, padding, position)
