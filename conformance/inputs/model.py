"""Inputs of the whole model, from backbone features on: a recipe of a few numbers, and parameters, features and sizes.

Bounds, with their reasons: 12 to 24 channels and up to 5 queries and 3 layers, so that an example takes milliseconds
and the gradient of every parameter can be had by differences; images of 5 to 70 pixels at strides of 4 to 64, so that
maps go down to one cell, do not nest and are not square; levels whose strides do not double; batches without padding whose
sides are no multiples of a stride; every parameter random, because a zero hides what multiplies it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import SEEDS
from smca.conformance.tolerances import round_to
from smca.reference.config import ModelConfig
from smca.reference.parameters import parameter_shapes

Array = npt.NDArray[np.float64]

STAGES = {4: 8, 8: 12, 16: 10, 32: 14, 64: 6}
"""Stride → channels of a backbone's maps."""


def given_strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the maps that the backbone gives: up to 8, and up to the last that is not twice the one before; the others are made.

    >>> given_strides((4, 8, 16)), given_strides((4, 16, 32)), given_strides((8, 32))
    ((4, 8), (4, 16), (8, 32))
    """
    jumps = [j for j in range(len(strides)) if j == 0 or strides[j] != 2 * strides[j - 1]]
    return tuple(stride for j, stride in enumerate(strides) if j <= jumps[-1] or stride <= 8)


_BIAS = "decoder.box_heads.0.layers.2.bias"
_REFERENCES = {"grid": "decoder.query_center", "anchors": "decoder.query_anchor", "random": _BIAS, "selected": _BIAS}
"""How queries begin → the parameter that decides where their boxes are before the second layer."""


class ModelArrays(NamedTuple):
    """Arguments of forward."""

    params: dict[str, Array]
    features: list[Array]
    valid_sizes: Array
    config: ModelConfig

    @property
    def padded_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the images of the batch were padded to, for a configuration that reads it."""
        if self.config.padding_cells != "nearest":
            return None
        height, width = self.valid_sizes.max(0).tolist()
        return int(height), int(width)

    @property
    def levels_given(self) -> int:
        """Maps that come from the backbone."""
        return len(self.features)


SMALL = ModelConfig(
    strides=(8,),
    num_classes=3,
    hidden_dim=24,
    num_heads=3,
    num_queries=5,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=20,
    prior_sigma_px=10.0,
)


def configuration(options: tuple[tuple[str, Any], ...]) -> ModelConfig:
    """The small model with these fields changed."""
    return replace(SMALL, **dict(options))


@dataclass(frozen=True)
class ModelInputs:
    """A configuration, the images' sizes in pixels, and a seed for parameters and features."""

    options: tuple[tuple[str, Any], ...] = ()
    """Fields of the configuration that differ from the small model's, with their values."""
    sizes: tuple[tuple[int, int], ...] = ((8, 8),)
    """(height, width) of each unpadded image."""
    seed: int = 0
    extreme: bool = False
    """Boxes lie within 10⁻⁵ or so of 0 or 1 when the second layer gets them."""

    def arrays(self, dtype: str) -> ModelArrays:
        """With values that `dtype` represents; what stands in padded cells is drawn like the rest."""
        rng, config = np.random.default_rng(self.seed), configuration(self.options)
        valid_sizes = np.array(self.sizes, dtype=np.float64)
        backbone_strides = given_strides(config.strides)
        features = []
        for stride in backbone_strides:
            rows, columns = (-(-int(side) // stride) for side in valid_sizes.max(0))
            features.append(round_to(rng.normal(size=(len(self.sizes), STAGES[stride], rows, columns)), dtype))
        params = {}
        for name, shape in parameter_shapes(config, [STAGES[stride] for stride in backbone_strides]).items():
            spread = 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
            values = rng.normal(size=shape) * spread
            if (".norm" in name and name.endswith("weight")) or "state_norm.weight" in name:
                values = values + 1.0
            if self.extreme and name == _REFERENCES[config.query_init]:
                values = values + rng.choice([-12.0, 12.0], shape)
            params[name] = round_to(values, dtype)
        return ModelArrays(params, features, valid_sizes, config)

    def describe(self) -> str:
        """Configuration, sizes of images and maps."""
        config = configuration(self.options)
        changed = ", ".join(f"{name}={value!r}" for name, value in self.options) or "the small model as it is"
        extreme = "; boxes near 0 and 1" if self.extreme else ""
        return f"{changed}; strides {config.strides}; images {self.sizes}; all parameters and features random{extreme}"


PADDING_APART = ["attention", "pyramid_conv"]
"""Encoders with which an image gives the same however far it is padded; the third masks nothing."""
LEVELS = ("strides", (4, 8, 16))
SOFTMAX = ("class_scores", "softmax")
PADDED = ((37, 61), (64, 24), (8, 8))
ODD = ((33, 47), (17, 47))
"""Not multiples of any stride: maps of 9 × 12, 5 × 6 and 3 × 3 cells, which do not nest."""

Options = list[tuple[str, Any]]
Sizes = tuple[tuple[int, int], ...]
_LISTED: list[tuple[Options, Sizes]] = [
    ([], PADDED),
    ([("pre_norm", True), ("query_init", "grid"), ("box_refinement", True), ("prior_scale", "single")], ODD),
    ([("encoder_layers", 2), ("decoder_layers", 3), ("prior_scale", "fixed"), ("num_queries", 1)], ODD),
    ([("cross_attention", "dense"), ("encoder_layers", 2)], PADDED),
    ([LEVELS, ("encoder_layers", 3), ("cross_level_blocks", (1,))], ODD),
    ([LEVELS, ("encoder_layers", 2), ("cross_level_blocks", (0, 1)), ("cross_attention", "dense")], PADDED),
    ([LEVELS, ("cross_attention", "dense"), ("scale_selection", False), ("pre_norm", True)], ODD),
    ([LEVELS, ("encoder", "pyramid_conv"), ("encoder_layers", 2)], ODD),
    (
        [LEVELS, ("encoder", "pyramid_conv"), ("pre_norm", True), ("query_init", "grid"), ("box_refinement", True)],
        PADDED,
    ),
    ([("strides", (4, 8, 16, 32)), ("encoder", "conv"), ("encoder_layers", 2), ("halve_finest", True)], ODD),
    ([LEVELS, ("encoder", "conv"), ("pre_norm", True), ("cross_attention", "dense")], PADDED),
    ([LEVELS, ("prior_heads", "shared"), ("prior_scale", "single"), ("cross_level_blocks", (0,))], PADDED),
    ([("strides", (4, 8, 16, 32)), ("pre_norm", True), ("box_refinement", True)], ODD),
    ([("strides", (8, 16)), ("encoder", "conv"), ("prior_heads", "shared")], ((5, 5),)),
    ([("num_heads", 1), ("encoder", "conv"), ("encoder_layers", 0), ("decoder_layers", 1)], ((70, 7),)),
    ([("prior_state", "entering"), ("position_encoding", "detr"), ("padding_cells", "nearest")], ((33, 13), (9, 47))),
    ([LEVELS, ("prior_sigma_px", (5.0, 7.0, 20.0)), ("position_encoding", "detr"), ("padding_cells", "nearest")], ODD),
    ([("encoder", "conv"), ("encoder_layers", 2), ("pre_norm", True)], ODD),
    ([LEVELS, ("halve_finest", True), ("cross_level_blocks", (0,)), ("prior_scale", "single")], PADDED),
    ([("strides", (4, 8)), ("encoder", "pyramid_conv"), ("halve_finest", True), ("pre_norm", True)], ODD),
    ([("cross_attention", "dense"), SOFTMAX], PADDED),
    ([LEVELS, SOFTMAX, ("num_classes", 1), ("pre_norm", True), ("encoder_layers", 0)], ODD),
    ([("strides", (8, 32)), ("cross_level_blocks", (0,))], ODD),
    ([("strides", (4, 16, 64)), ("encoder", "pyramid_conv"), ("encoder_layers", 2)], ((70, 47), (33, 64))),
    ([("strides", (4, 16)), ("encoder", "pyramid_conv"), ("pre_norm", True), ("halve_finest", True)], ((33, 47),)),
    ([LEVELS, ("query_init", "grid"), ("box_refinement", True)], ((37, 61), (37, 61))),
]

_REFINED: Options = [("query_init", "grid"), ("box_refinement", True), ("decoder_layers", 3)]
CONFIGURATIONS = [
    *(ModelInputs(tuple(options), sizes, seed) for seed, (options, sizes) in enumerate(_LISTED)),
    ModelInputs((LEVELS, *_REFINED), ODD, 100, extreme=True),
]
"""Every option and every pair that could hide one another, with padding and with sizes that do not nest."""


def doubling(options: dict[str, Any]) -> None:
    """Make the authors' encoder, which takes no other levels than those whose strides double, another one where they don't."""
    strides = options["strides"]
    if options["encoder"] == "conv" and any(strides[j] != 2 * strides[j - 1] for j in range(1, len(strides))):
        options["encoder"] = "pyramid_conv"


@st.composite
def model_inputs(draw: st.DrawFn, /, **fixed: Any) -> ModelInputs:
    """Any configuration of the method, its options and its ablations; `fixed` pins fields of it."""
    usual: dict[str, Any] = {
        "strides": st.sampled_from([(8,), (4, 8, 16), (8, 16), (4, 8), (4, 8, 16, 32), (8, 32), (4, 16, 64), (4, 16)]),
        "encoder": st.sampled_from([*PADDING_APART, "conv"]),
        "halve_finest": st.booleans(),
        "encoder_layers": st.integers(0, 2),
        "cross_attention": st.sampled_from(["smca", "dense"]),
        "num_heads": st.sampled_from([3, 1]),
        "num_queries": st.sampled_from([5, 1]),
        "decoder_layers": st.integers(1, 3),
        "pre_norm": st.booleans(),
        "prior_scale": st.sampled_from(["independent", "single", "fixed"]),
        "prior_heads": st.sampled_from(["independent", "shared"]),
        "scale_selection": st.booleans(),
        "query_init": st.sampled_from(["random", "grid"]),
        "box_refinement": st.booleans(),
        "prior_state": st.sampled_from(["attended", "entering"]),
        "position_encoding": st.sampled_from(["centers", "detr"]),
        "padding_cells": st.sampled_from(["covered", "nearest"]),
        "class_scores": st.sampled_from(["sigmoid", "sigmoid", "softmax"]),
    }
    options: dict[str, Any] = {}
    for name, values in (usual | fixed).items():
        options[name] = draw(values) if isinstance(values, st.SearchStrategy) else values
    doubling(options)
    several = len(options["strides"]) > 1
    if not several:
        del options["scale_selection"]  # not an option of one level, nor the prior's of a model without one
    if options["cross_attention"] == "dense":
        del options["prior_scale"], options["prior_heads"]
    if several and options["encoder"] == "attention" and options["encoder_layers"]:
        blocks = list(range(options["encoder_layers"]))
        options["cross_level_blocks"] = tuple(sorted(draw(st.sets(st.sampled_from(blocks)))))
    side = st.one_of(st.integers(5, 24), st.sampled_from([33, 47, 64, 70]))
    sizes = tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=3)))
    return ModelInputs(tuple(options.items()), sizes, draw(SEEDS), draw(st.sampled_from([False, False, False, True])))
