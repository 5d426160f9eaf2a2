"""Every parameter of the model by name, with its shape.

The names and shapes are those of the production model's state_dict, so that one set of weights drives both. Weights are
[out, in], those of convolutions [out, in, k, k]. Names that begin with "backbone." are not read: the specification starts
from features.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, require_shape
from smca.reference.config import ModelConfig, class_outputs, embeds_levels, has_anchors, selects_scales, uses_prior
from smca.reference.layers import Params

OURS = ("input_proj.", "level_embed", "encoder.", "halve.", "decoder.", "dense_head.")
"""How the names of all parameters begin."""


def parameter_shapes(config: ModelConfig, channels: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Every parameter that a configuration has, by name, with its shape.

    Args:
        config: as configured.
        channels: C_j, channels of each of the backbone's maps: the first levels. The next one is made from the last map,
            any further one from the level before it.

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

    def add_mlp(name: str, *widths: int) -> None:
        for index in range(len(widths) - 1):
            add_linear(f"{name}.layers.{index}", widths[index + 1], widths[index])

    def add_convolution(name: str, in_channels: int, kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c, in_channels, kernel, kernel), (c,)

    for j in range(levels):
        read = channels[j] if j < len(channels) else channels[-1] if j == len(channels) else c
        add_convolution(f"input_proj.{j}", read, 1 if j < len(channels) else 3)
    if embeds_levels(config):
        shapes["level_embed"] = (levels, c)

    for index in range(config.encoder_layers):
        layer = f"encoder.layers.{index}"
        if config.encoder == "conv":
            add_linear(f"{layer}.conv.in_proj", c, c)
            exchanged = ["finer", "coarser"] if levels > 1 else []
            for kernel in [*(f"own.{j}" for j in range(levels)), *exchanged]:
                add_convolution(f"{layer}.conv.{kernel}", 1, 7)
            add_linear(f"{layer}.conv.out_proj", c, c)
        elif config.encoder == "pyramid_conv":
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
    if config.halve_finest:
        add_convolution("halve", c, 3)

    if has_anchors(config):
        shapes["decoder.query_content"] = (config.num_queries, c)
        add_mlp("decoder.box_position", 2 * c, c, c)
    else:
        shapes["decoder.query_position"] = (config.num_queries, c)
    if config.query_init == "anchors":
        shapes["decoder.query_anchor"] = (config.num_queries, 4)
    if config.denoising_groups:
        shapes["decoder.label_embed"] = (config.num_classes, c)
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
    if uses_prior(config) and not has_anchors(config):
        add_mlp("decoder.center_head", c, c, c, 2)
        if config.query_init == "grid":
            shapes["decoder.query_center"] = (config.num_queries, 2)
    add_norm("decoder.norm")
    add_linear("decoder.class_head", class_outputs(config), c)
    for index in range(config.decoder_layers if config.box_refinement else 1):
        add_mlp(f"decoder.box_heads.{index}", c, c, c, 4)
    if config.dense_head:
        add_linear("dense_head.class_head", config.num_classes, c)
        add_mlp("dense_head.box_head", c, c, 4)
    return shapes


def checked_parameters(params: Mapping[str, npt.ArrayLike], shapes: dict[str, tuple[int, ...]]) -> Params:
    """The parameters that `shapes` lists, as float64.

    Raises:
        ValueError: one that is missing, that has another shape, or that another configuration has.
    """
    for key in params:
        if key not in shapes and key.startswith(OURS):
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
