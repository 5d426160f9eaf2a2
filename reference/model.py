"""From a backbone's features to class logits and boxes.

    (1)  (h, w) = valid size / stride                                the unpadded image in cells, fractional
    (2)  cell (i, j) is padded if i ≥ w or j ≥ h                     it holds no pixel of the image
    (3)  x = input_proj(features)                                    1 × 1 convolution: a linear map of each cell
    (4)  pos = sine encoding of the cells (`position`)
    (5)  x = encoder layers (`layers` (5)); then encoder.norm(x) if pre-norm
    (6)  logits, boxes = decoder (`decoder`)

The parameters are those of the production model's state_dict, by name and shape (`parameter_shapes` is the list), so
that one set of weights drives both. Weights are [out, in], those of the 1 × 1 convolution [out, in, 1, 1]. Names that
begin with "backbone." are not read: the specification starts from features. Sources: method.md; DETR, "DETR
architecture"; paper, the whole of its method section for one scale.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import BoolArray, FloatArray, require_shape
from smca.reference.config import ModelConfig, check_config, uses_prior
from smca.reference.decoder import decoder
from smca.reference.layers import Params, encoder_layer, layer_norm
from smca.reference.position import sine_position_encoding


def forward(
    params: Mapping[str, npt.ArrayLike], features: npt.ArrayLike, valid_sizes: npt.ArrayLike, config: ModelConfig
) -> dict[str, FloatArray]:
    """The model in evaluation mode, single scale. Equations (1) to (6).

    Args:
        params: named and shaped as `parameter_shapes` says. Keys that begin with "backbone." are ignored.
        features: [B, C_in, H, W], the backbone's map. Padded cells may hold anything, NaN included.
        valid_sizes: [B, 2], (height, width) of the unpadded images in pixels of the network's input.
        config: as configured.

    Returns:
        "logits" [M, B, N, K] and "boxes" [M, B, N, 4] (cxcywh in [0, 1] of the unpadded image), M decoder layers, the
        last one being the answer.

    Raises:
        ValueError: a value that the configuration can't have; a parameter missing, misshapen or not of this
            configuration; features or valid sizes of another shape; an image that doesn't fit the map.
    """
    check_config(config)
    features = np.asarray(features, dtype=np.float64)
    require_shape("features", features, (None, None, None, None), "Give the backbone's map, [B, C_in, H, W].")
    batch, in_channels, height, width = features.shape
    weights = _checked_params(params, parameter_shapes(config, in_channels))
    valid_cells = _valid_cells(np.asarray(valid_sizes, dtype=np.float64), batch, (height, width), config.stride)
    padding = key_padding_mask(valid_cells, (height, width))

    cells = features.reshape(batch, in_channels, height * width).transpose(0, 2, 1)  # [B, L, C_in], row-major
    x = cells @ weights["input_proj.weight"][:, :, 0, 0].T + weights["input_proj.bias"]  # (3) [B, L, C]
    position = sine_position_encoding((height, width), valid_cells, config.hidden_dim)  # (4)
    memory = encoder(x, position, padding, weights, config)  # (5)
    logits, boxes = decoder(memory, position, valid_cells, (height, width), padding, weights, config)  # (6)
    return {"logits": logits, "boxes": boxes}


def encoder(
    x: FloatArray, position: FloatArray, key_padding_mask: BoolArray, params: Params, config: ModelConfig
) -> FloatArray:
    """All layers of the encoder, [B, L, C] → [B, L, C]. Equation (5).

    In pre-norm a layer adds to x without normalising the sum, so the last sum is normalised once.
    """
    for index in range(config.encoder_layers):
        name = f"encoder.layers.{index}"
        x = encoder_layer(x, position, key_padding_mask, params, name, config.num_heads, config.pre_norm)
    return layer_norm(x, params, "encoder.norm") if config.pre_norm else x


def key_padding_mask(valid_cells: FloatArray, size: tuple[int, int]) -> BoolArray:
    """[B, H·W], True where a cell holds no pixel of the image. Equation (2).

    Args:
        valid_cells: [B, 2], (height, width) of the unpadded image in cells, fractional.
        size: (H, W) of the map.

    An image one cell high and 1½ wide, on a map of 2 × 3: its second column is half covered, and so not padded.

    >>> key_padding_mask(np.array([[1.0, 1.5]]), (2, 3)).astype(int).tolist()
    [[0, 0, 1, 1, 1, 1]]
    """
    height, width = size
    row_padded = np.arange(height) >= valid_cells[:, :1]  # [B, H]
    column_padded = np.arange(width) >= valid_cells[:, 1:]  # [B, W]
    return (row_padded[:, :, None] | column_padded[:, None, :]).reshape(-1, height * width)


def parameter_shapes(config: ModelConfig, in_channels: int) -> dict[str, tuple[int, ...]]:
    """Every parameter that a configuration has, by name, with its shape.

    Args:
        config: as configured.
        in_channels: C_in, channels of the backbone's features.
    """
    c, f, heads = config.hidden_dim, config.feedforward_dim, config.num_heads
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

    shapes["input_proj.weight"], shapes["input_proj.bias"] = (c, in_channels, 1, 1), (c,)

    for index in range(config.encoder_layers):
        layer = f"encoder.layers.{index}"
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
        if uses_prior(config):
            add_norm(f"{layer}.prior.norm")
            add_linear(f"{layer}.prior.offset_head", 2 * heads, c)
            if config.prior_scale != "fixed":
                outputs = heads if config.prior_scale == "single" else 2 * heads
                add_linear(f"{layer}.prior.scale_head", outputs, c)
    if uses_prior(config):
        add_mlp("decoder.center_head", 2)
        if config.query_init == "grid":
            shapes["decoder.query_center"] = (config.num_queries, 2)
    add_norm("decoder.norm")
    add_linear("decoder.class_head", config.num_classes, c)
    for index in range(config.decoder_layers if config.box_refinement else 1):
        add_mlp(f"decoder.box_heads.{index}", 4)
    return shapes


def _valid_cells(valid_sizes: FloatArray, batch: int, size: tuple[int, int], stride: int) -> FloatArray:
    """(1), with a check that the images and the map belong together. [B, 2] pixels → [B, 2] cells."""
    require_shape("valid_sizes", valid_sizes, (batch, 2), "Give (height, width) in pixels, one row an image.")
    valid_cells = valid_sizes / stride
    # A backbone may drop up to the last cell where a side is no multiple of the stride, but not more than that.
    fits = (valid_cells > 0) & (valid_cells < np.array(size) + 1)
    if not fits.all():
        image = int(np.argwhere(~fits)[0, 0])
        raise ValueError(
            f"valid_sizes[{image}]: expected (height, width) in pixels of an image that a map of {size} cells with a "
            f"stride of {stride} can hold, got {valid_sizes[image].tolist()}. Check the order, the unit and "
            "config.stride."
        )
    return valid_cells


def _checked_params(params: Mapping[str, npt.ArrayLike], shapes: dict[str, tuple[int, ...]]) -> Params:
    """The parameters that `shapes` lists, as float64, each with the shape that it lists."""
    for key in params:
        if key not in shapes and key.startswith(("input_proj.", "encoder.", "decoder.")):
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
