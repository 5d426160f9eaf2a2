"""From a backbone's features to class logits and boxes.

    (1)  (h_j, w_j) = valid size / stride_j, padding_j               the image in cells of level j (`position` (1), (2))
    (2)  x_j = input_proj_j(features_j)                              1 × 1 convolution: a linear map of each cell
    (3)  x_j = input_proj_j(x_{j−1})                                 levels beyond the backbone's: 3 × 3, stride 2
    (4)  pos_j = sine encoding of the cells (`position` (3) to (5))  + level_embed_j, where attention mixes several levels
    (5)  x = encoder (`encoder`)
    (6)  logits, boxes = decoder (`decoder`)

A backbone gives a map for each of the first levels. Each level beyond them is made from the level before it (3), with 0
in place of padded cells, and has twice its stride. (Of the projected level, C → C. Read from a ResNet-50's last stage,
2048 → C, this convolution alone would have 4.7 M parameters, more than the published 40 M leave room for.)

The parameters are those of the production model's state_dict, by name and shape (`parameter_shapes` is the list), so
that one set of weights drives both. Weights are [out, in], those of convolutions [out, in, k, k]. Names that begin
with "backbone." are not read: the specification starts from features. Sources: method.md; DETR, "DETR architecture";
paper, the whole of its method section.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, require_shape
from smca.reference.config import ModelConfig, check_config, embeds_levels, selects_scales, uses_prior
from smca.reference.decoder import decoder
from smca.reference.encoder import encoder
from smca.reference.layers import Params, cells_of_map, convolution, zero_padded
from smca.reference.position import Grid, key_padding_mask, sine_position_encoding


def forward(
    params: Mapping[str, npt.ArrayLike],
    features: Sequence[npt.ArrayLike],
    valid_sizes: npt.ArrayLike,
    config: ModelConfig,
) -> dict[str, FloatArray]:
    """The model in evaluation mode. Equations (1) to (6).

    Args:
        params: named and shaped as `parameter_shapes` says. Keys that begin with "backbone." are ignored.
        features: the backbone's maps, [B, C_j, H_j, W_j], for the first of config.strides, at least one. Padded cells
            may hold anything, NaN included.
        valid_sizes: [B, 2], (height, width) of the unpadded images in pixels of the network's input.
        config: as configured.

    Returns:
        "logits" [M, B, N, K] and "boxes" [M, B, N, 4] (cxcywh in [0, 1] of the unpadded image), M decoder layers, the
        last one being the answer.

    Raises:
        ValueError: a value that the configuration can't have; a parameter missing, misshapen or not of this
            configuration; features or valid sizes of another number or shape; an image that doesn't fit a map.
    """
    check_config(config)
    maps = [np.asarray(each, dtype=np.float64) for each in features]
    for j, each in enumerate(maps):
        require_shape(f"features[{j}]", each, (len(maps[0]), None, None, None), "Give maps, each [B, C_j, H_j, W_j].")
    weights = _checked_params(params, parameter_shapes(config, [each.shape[1] for each in maps]))
    sizes = [(each.shape[2], each.shape[3]) for each in maps]
    while len(sizes) < len(config.strides):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))  # what a stride of 2 leaves
    grids = _grids(np.asarray(valid_sizes, dtype=np.float64), len(maps[0]), sizes, weights, config)  # (1), (4)
    memory = encoder(project(maps, grids, weights), grids, weights, config)  # (5)
    logits, boxes = decoder(memory, grids, weights, config)  # (6)
    return {"logits": logits, "boxes": boxes}


def project(features: Sequence[FloatArray], grids: Sequence[Grid], params: Params) -> list[FloatArray]:
    """Every level with C channels. Equations (2) and (3).

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
            maps.append(convolution(features[j], params, f"input_proj.{j}"))  # (2)
        else:
            source = zero_padded(maps[-1], grids[j - 1].key_padding_mask)
            maps.append(convolution(source, params, f"input_proj.{j}", stride=2))  # (3)
    return [cells_of_map(x) for x in maps]


def parameter_shapes(config: ModelConfig, channels: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Every parameter that a configuration has, by name, with its shape.

    Args:
        config: as configured.
        channels: C_j, channels of each of the backbone's maps: the first levels. The others are made from the last.

    Raises:
        ValueError: no map, more maps than levels, or a level beyond the maps without twice the stride.
    """
    _check_maps(config, len(channels))
    c, f, levels = config.hidden_dim, config.feedforward_dim, len(config.strides)
    shapes: dict[str, tuple[int, ...]] = {}

    def add_linear(name: str, out_channels: int, in_channels: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out_channels, in_channels), (out_channels,)

    def add_norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c,), (c,)

    def add_attention(name: str) -> None:
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add_linear(f"{name}.{projection}", c, c)

    def add_mlp(name: str, out_channels: int) -> None:
        for index, channels in enumerate((c, c, out_channels)):
            add_linear(f"{name}.layers.{index}", channels, c)

    for j in range(levels):
        in_channels = channels[j] if j < len(channels) else c
        kernel = (1, 1) if j < len(channels) else (3, 3)
        shapes[f"input_proj.{j}.weight"], shapes[f"input_proj.{j}.bias"] = (c, in_channels, *kernel), (c,)
    if embeds_levels(config):
        shapes["level_embed"] = (levels, c)

    for index in range(config.encoder_layers):
        layer = f"encoder.layers.{index}"
        if config.encoder == "conv":
            for taken_from in ("own", "finer", "coarser") if levels > 1 else ("own",):
                shapes[f"{layer}.conv.{taken_from}.weight"] = (c, 1, 3, 3)
            add_linear(f"{layer}.conv.out_proj", c, c)
        else:
            add_attention(f"{layer}.self_attn")
        add_norm(f"{layer}.norm1")
        add_norm(f"{layer}.norm2")
        add_linear(f"{layer}.linear1", f, c)
        add_linear(f"{layer}.linear2", c, f)
    if config.pre_norm:
        add_norm("encoder.norm")

    shapes["decoder.query_position"] = (config.num_queries, c)
    for index in range(config.decoder_layers):
        layer = f"decoder.layers.{index}"
        add_attention(f"{layer}.self_attn")
        add_attention(f"{layer}.cross_attn")
        for norm in ("norm1", "norm2", "norm3"):
            add_norm(f"{layer}.{norm}")
        add_linear(f"{layer}.linear1", f, c)
        add_linear(f"{layer}.linear2", c, f)
        if uses_prior(config) or selects_scales(config):
            add_norm(f"{layer}.state_norm")
        if uses_prior(config):
            priors = levels * (1 if config.prior_heads == "shared" else config.num_heads)
            add_linear(f"{layer}.prior.offset_head", 2 * priors, c)
            if config.prior_scale != "fixed":
                add_linear(f"{layer}.prior.scale_head", (1 if config.prior_scale == "single" else 2) * priors, c)
        if selects_scales(config):
            add_linear(f"{layer}.level_head", levels, c)
    if uses_prior(config):
        add_mlp("decoder.center_head", 2)
        if config.query_init == "grid":
            shapes["decoder.query_center"] = (config.num_queries, 2)
    add_norm("decoder.norm")
    add_linear("decoder.class_head", config.num_classes, c)
    for index in range(config.decoder_layers if config.box_refinement else 1):
        add_mlp(f"decoder.box_heads.{index}", 4)
    return shapes


def _grids(
    valid_sizes: FloatArray, batch: int, sizes: Sequence[tuple[int, int]], params: Params, config: ModelConfig
) -> list[Grid]:
    """(1) and (4), with a check that images and maps belong together: [B, 2] pixels → where the cells of each level are."""
    require_shape("valid_sizes", valid_sizes, (batch, 2), "Give (height, width) in pixels, one row an image.")
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


def _check_maps(config: ModelConfig, given: int) -> None:
    strides = config.strides
    if not 1 <= given <= len(strides):
        raise ValueError(
            f"features: expected 1 to {len(strides)} maps for config.strides = {strides}, got {given}. Give a sequence "
            "of the backbone's maps, finest first."
        )
    for j in range(given, len(strides)):
        if strides[j] != 2 * strides[j - 1]:
            raise ValueError(
                f"config.strides[{j}]: expected {2 * strides[j - 1]}, twice the stride before it, for a level beyond "
                f"the {given} that the backbone gives, got {strides[j]}."
            )


def _checked_params(params: Mapping[str, npt.ArrayLike], shapes: dict[str, tuple[int, ...]]) -> Params:
    """The parameters that `shapes` lists, as float64, each with the shape that it lists."""
    for key in params:
        if key not in shapes and key.startswith(("input_proj.", "level_embed", "encoder.", "decoder.")):
            raise ValueError(
                f"params[{key!r}]: expected no such parameter under this configuration, got one of shape "
                f"{np.shape(params[key])}. Use the configuration that the parameters were made with."
            )
    weights: dict[str, FloatArray] = {}
    for key, shape in shapes.items():
        if key not in params:
            raise ValueError(
                f"params[{key!r}]: expected shape {shape}, got no such key. Use the configuration that the parameters "
                "were made with, and their names in the state_dict."
            )
        weights[key] = np.asarray(params[key], dtype=np.float64)
        require_shape(f"params[{key!r}]", weights[key], shape, "Use the configuration that they were made with.")
    return weights
